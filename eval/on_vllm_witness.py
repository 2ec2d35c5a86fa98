"""What may follow in an answer that was disturbed while vLLM wrote it.

A request that is preempted is computed again, with what it had written so far: on moved KV if what was prepared for it
can be loaded then, exactly if it was robbed of that. Its answer is therefore right if each token is what a greedy
reader would write next on one of the two.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcomm import Context, Engine, ReusePolicy, SamplingParams, Segment


class Witness:
    """One prompt in kvcomm's own engine, on moved KV and on exact KV; to be closed.

    Attributes:
        plan: moved tokens of the moved prompt, and its rung.
    """

    def __init__(self, own: Engine, read: Sequence[Segment], asked: Sequence[Segment], policy: ReusePolicy) -> None:
        """Reads one prompt, whose text is then moved into the other as the policy allows."""
        with own.empty_context(policy=policy) as reader:
            reader.extend(read)
        # Moved first: what was computed exactly would be found as a prefix, and nothing moved.
        self._moved = own.empty_context(policy=policy)
        usage = self._moved.submit(SamplingParams(max_new_tokens=0), prompt=asked).result().usage
        self._exact = own.empty_context(policy=ReusePolicy.exact()).extend(asked)
        self.plan = (usage.aligned_tokens, None if usage.approximation is None else usage.approximation.rung)

    def close(self) -> None:
        self._exact.release()
        self._moved.release()

    def on_moved(self, answer: Sequence[int]) -> int | None:
        """Index of the first token that does not follow on moved KV; None: there is none."""
        return _first_wrong(answer, [self._moved])

    def on_exact(self, answer: Sequence[int]) -> int | None:
        """Likewise on exact KV."""
        return _first_wrong(answer, [self._exact])

    def on_any(self, answer: Sequence[int]) -> int | None:
        """Likewise of those that follow on neither."""
        return _first_wrong(answer, [self._moved, self._exact])


def _first_wrong(answer: Sequence[int], contexts: Sequence[Context]) -> int | None:
    for index, token in enumerate(answer):
        if token not in {_next(context, answer[:index]) for context in contexts}:
            return index
    return None


def _next(context: Context, written: Sequence[int]) -> int:
    """The token that a greedy reader of the context writes behind these ones."""
    with context.fork() as fork:
        if written:
            fork.extend([Segment(tuple(written))])
        (token,) = fork.generate(max_new_tokens=1, ignore_eos=True).token_ids
        return token
