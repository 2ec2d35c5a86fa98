"""Thoughts: the steps a tree search chooses among, and the default way to make them.

A thought is a fork of its parent's context with some text behind it. Whoever makes thoughts hands their
contexts over with them, and leaves none open on an error. Nothing here knows which thoughts are good or what
a search does with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest

if TYPE_CHECKING:
    from kvcomm.engine.context import Context
    from kvcomm.engine.handle import RequestHandle
    from kvcomm.memory.segments import Prompt


@dataclass(frozen=True)
class Thought:
    """One step of a path.

    Attributes:
        context: a fork of the parent's context with the thought behind it; becomes the search's own.
        text: the thought.
        is_final: nothing can follow; the path is complete.
    """

    context: Context
    text: str
    is_final: bool = False


Expand = Callable[[Sequence["Context"]], Sequence[Sequence[Thought]]]
"""Continuations of several contexts at once: one sequence of thoughts per context given. The given contexts
stay the search's and must not be changed or returned: fork them."""

Score = Callable[["Context", str], float]
"""How good a path is, given its context and its last thought; finite, higher is better."""


@dataclass(frozen=True)
class SampleThoughts:
    """The default way to expand: fork, and sample a continuation in each fork, all in one batch.

    A thought is final when the model ended its turn; if `sampling` has stop strings or stop tokens this
    cannot be told apart, and the search's `is_final` decides alone.

    Attributes:
        n: thoughts per context.
        sampling: length and randomness of a thought. With a seed, every thought has its own seed, derived
            from it, the context's tokens and the thought's number.
        prompt: put behind the context before each thought; computed once for all n.

    Raises:
        InvalidRequest: n below 1, sampling.n other than 1, or several thoughts from greedy sampling.
    """

    n: int = 3
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=64, temperature=0.8))
    prompt: Prompt | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InvalidRequest(f"n must be at least 1 thought per context, got {self.n}")
        if self.sampling.n != 1:
            raise InvalidRequest(f"a thought is one answer, but sampling has n={self.sampling.n}; use SampleThoughts.n")
        if self.n > 1 and self.sampling.temperature == 0:
            raise InvalidRequest(f"{self.n} greedy thoughts would be the same; set a temperature above 0, or n=1")

    def __call__(self, contexts: Sequence[Context]) -> list[list[Thought]]:
        """Sample n thoughts for each context. On an error nothing stays open."""
        children: list[Context] = []
        handles: list[RequestHandle] = []
        try:
            for parent in contexts:
                self._fork_into(children, parent)
            for number, child in enumerate(children):
                handles.append(child.submit(self._sampling_of(child, number % self.n)))
            thoughts = [self._thought(*pair) for pair in zip(children, handles, strict=True)]
        except BaseException:  # Ctrl-C too: pages must not stay behind
            _abandon(children, handles)
            raise
        return [thoughts[start : start + self.n] for start in range(0, len(thoughts), self.n)]

    def _fork_into(self, children: list[Context], parent: Context) -> None:
        with parent.fork() as stem:
            if self.prompt is not None:
                stem.extend(self.prompt)
            children.extend(stem.fork() for _ in range(self.n))

    def _sampling_of(self, context: Context, number: int) -> SamplingParams:
        if self.sampling.seed is None:
            return self.sampling
        source = f"{self.sampling.seed}:{number}:{','.join(map(str, context.tokens))}"
        digest = hashlib.sha256(source.encode()).digest()
        return replace(self.sampling, seed=int.from_bytes(digest[:4], "little"))

    def _thought(self, context: Context, handle: RequestHandle) -> Thought:
        completion = handle.result()
        ambiguous = self.sampling.stop or self.sampling.stop_token_ids
        return Thought(context, completion.text, completion.finish_reason == "stop" and not ambiguous)


def _abandon(contexts: Iterable[Context], handles: Iterable[RequestHandle]) -> None:
    for handle in handles:
        handle.cancel()
    for context in contexts:
        context.release()
