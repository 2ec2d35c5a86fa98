"""Serving a workload on a fresh engine, request after request without a pause, and holding every call against exact KV.

Beside the served engine stands its twin, which allows exact reuse only and gets the very same prompts in turn: what the
agents of the served engine have answered. The twin's first tokens are what exact reuse takes, its answers are the exact
continuations. While the twin works and divergences are measured, the served engine is held: it learns nothing in that
time, its clock stands, and for it the next request comes at once. What it still does after an answer the next request
has to wait for, as it would without the pause.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from eval.firstday.auditing import divergence
from eval.firstday.methods import Laboratory
from eval.firstday.movable import TokenIds, movable_of
from eval.firstday.records import Call, Served
from eval.firstday.workloads import Workload
from kvcomm import (
    Completion,
    Context,
    Engine,
    KVCommAgentGroup,
    RequestHandle,
    ReusePolicy,
    SamplingParams,
    Segment,
    Usage,
)
from kvcomm.agents import AgentResult
from kvcomm.lab.moving import NUM_CONTINUATION
from kvcomm.lab.teams import AgentGraph, Task

EXACT = ReusePolicy.exact()


class Kept(NamedTuple):
    """A request whose KV is still there."""

    prompt: tuple[Segment, ...]
    context: Context
    handle: RequestHandle

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return sum(len(segment.token_ids) for segment in self.prompt)


class Keeper:
    """An engine, as a group sees it, that keeps the context of every request until `release`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.kept: list[Kept] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def submit(
        self,
        prompt: tuple[Segment, ...],
        sampling: SamplingParams,
        *,
        policy: ReusePolicy,
        adapter: str | None = None,
        tenant: str = "default",
    ) -> RequestHandle:
        """As `Engine.submit`; the KV of prompt and answer stays in a context."""
        context = self.engine.empty_context(adapter=adapter, tenant=tenant, policy=policy)
        try:
            handle = context.submit(sampling, prompt=prompt)
        except BaseException:
            context.release()
            raise
        self.kept.append(Kept(prompt, context, handle))
        return handle

    def release(self) -> None:
        """Give all contexts back."""
        for each in self.kept:
            each.context.release()
        self.kept.clear()


@dataclass(frozen=True)
class Twin:
    """What the exact engine gave for one prompt."""

    kept: Kept
    completion: Completion


class Server:
    """One workload, request after request."""

    def __init__(
        self,
        engine: Engine,
        twin: Engine,
        workload: Workload,
        policy: ReusePolicy,
        learning_s: Callable[[Engine], float],
        laboratory: Laboratory | None = None,
    ) -> None:
        """Make one.

        Args:
            engine: fresh; never idle for long enough to think that nobody asks any more.
            twin: of the same model, with nothing in its cache.
            learning_s: seconds that an engine has spent on learning.
            laboratory: measures other methods on the same prompts; None: nobody does.
        """
        self._engine = engine
        self._here, self._twin = Keeper(engine), Keeper(twin)
        self._workload = workload
        self._policy = policy
        self._learning_s = learning_s
        self._laboratory = laboratory
        self._group = workload.team.group(self._here, policy=policy, read_along=False)  # type: ignore[arg-type]
        self._waves = waves_of(self._group)
        self._known: frozenset[TokenIds] = frozenset()

    def serve(self) -> Iterator[Served]:
        """Serve all requests; the served engine stands still while the caller works on what is yielded."""
        learned_s = self._learning_s(self._engine)
        waited_s = 0.0
        for number, inputs in enumerate(self._workload.inputs, start=1):
            began_s = time.perf_counter()
            result = self._group.run(rounds=1, **{**self._workload.team.inputs, **inputs})
            answered_s = time.perf_counter()
            with self._engine.held():
                held_s = time.perf_counter()
                before_s, learned_s = learned_s, self._learning_s(self._engine)
                try:
                    calls = self._calls(result, waited_s)
                finally:
                    self._here.release()
                waited_s = held_s - answered_s
                num_pairs = sum(len(standing.pairs) for standing in self._engine.reuse.readers())
                yield Served(number, held_s - began_s, learned_s - before_s, calls, num_pairs)

    def _calls(self, results: Mapping[str, AgentResult], waited_s: float) -> tuple[Call, ...]:
        """What became of every agent's call, held against the twin's, wave by wave.

        Args:
            waited_s: for what the engine still did when the request could have come; the first wave waits for it.
        """
        calls = []
        for wave in self._waves:
            kept = [next(each for each in self._here.kept if each.prompt is results[agent].prompt) for agent in wave]
            usages = [results[agent].usage for agent in wave]
            try:
                twins = self._ask_twin(kept, [usage.aligned_tokens > 0 for usage in usages])
                for agent, own, usage, twin in zip(wave, kept, usages, twins, strict=True):
                    call = self._call(agent, own, usage, twin)
                    calls.append(replace(call, ttft_s=call.ttft_s + waited_s))
            finally:
                self._twin.release()
            waited_s = 0.0
            for agent in wave:
                texts = {segment.token_ids for segment in results[agent].prompt if segment.name is not None}
                self._known |= texts | {results[agent].token_ids}
        return tuple(calls)

    def _ask_twin(self, kept: Sequence[Kept], looks: Sequence[bool]) -> list[Twin]:
        """Exact first tokens, and the exact continuation of those that are looked at; all at once, as here."""
        with self._twin.engine.held():
            for each, is_audited in zip(kept, looks, strict=True):
                sampling = SamplingParams(max_new_tokens=NUM_CONTINUATION if is_audited else 1)
                self._twin.submit(each.prompt, sampling, policy=EXACT)
        return [Twin(each, each.handle.result()) for each in self._twin.kept]

    def _call(self, agent: str, own: Kept, usage: Usage, twin: Twin) -> Call:
        found = movable_of(own.prompt, usage.spans, self._known)
        call = Call(
            agent=agent,
            prompt=usage.prompt_tokens,
            exact=usage.exact_tokens,
            aligned=usage.aligned_tokens,
            computed=usage.computed_tokens,
            movable=found.num_movable,
            moved=found.num_moved,
            reasons=dict(usage.reasons),
            ttft_s=usage.ttft_s,
            exact_ttft_s=twin.completion.usage.ttft_s,
        )
        if usage.aligned_tokens:
            call = self._audited(call, own, usage, twin)
        if self._laboratory is not None:
            self._laboratory.read(own.prompt)
        return call

    def _audited(self, call: Call, own: Kept, usage: Usage, twin: Twin) -> Call:
        answer, report, bound = twin.completion.token_ids, usage.approximation, usage.bound
        assert report is not None, "moved text without a report"
        assert bound is not None, "moved text without a bound"
        call = replace(
            call,
            level=None if bound.level is None else str(bound.level),
            num_pairs=bound.num_pairs,
            rung=report.rung,
            predicted=report.predicted,
        )
        if not answer:  # the exact answer is empty: there is no token to look at
            return call
        measured = divergence(self._engine.model, own.context, twin.kept.context, own.num_prompt, answer)
        methods: Mapping[str, float] = {}
        if self._laboratory is not None:
            methods = self._laboratory.measure(own.prompt, answer, call.recomputed_share)
        return replace(call, divergence=measured, methods=dict(methods))


def waves_of(group: KVCommAgentGroup) -> list[list[str]]:
    """Agents that are ready at the same time, in the order in which they are asked."""
    graph = AgentGraph(group.agents)
    depth: dict[str, int] = {}

    def depth_of(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max((depth_of(task.agent) for task in graph.needs(Task(name, 1))), default=-1)
        return depth[name]

    names = [agent.name for agent in group.agents]
    return [[name for name in names if depth_of(name) == level] for level in range(1 + max(map(depth_of, names)))]
