"""A group of agents that share one engine, and so one KV cache.

The group owns the list of agents and what they have in common (tenant, sampling, policy). A run is checked
completely before anything is computed, and leaves nothing in flight however it ends: finished, failed, closed
or interrupted. The order in which agents run follows from their placeholders alone; the group has no
scheduling of its own.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing
from types import TracebackType
from typing import TYPE_CHECKING, cast

from kvcomm.agents.agent import Agent, check_one_answer
from kvcomm.agents.graph import AgentGraph
from kvcomm.agents.rendering import Input, PromptRenderer
from kvcomm.agents.results import GroupEvent, GroupFinished, GroupResult
from kvcomm.agents.running import Failure, GroupRun, RunPlan
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest
from kvcomm.reuse.policy import ReusePolicy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvcomm.engine.engine import Engine

MAX_SHOWN = 6


class KVCommAgentGroup:
    """Agents that answer together, each reading the run's inputs and other agents' answers.

    Args:
        engine_or_model: an Engine (stays the caller's), or a transformers model from which one is made.
        tokenizer: the model's tokenizer; None with an Engine.
        policy: how far reuse may depart from exact answers; None: the engine's.
        sampling: for agents that bring none; None: `SamplingParams()`.
        tenant: whose cache is used.

    Raises:
        InvalidRequest: a model without a tokenizer, or an Engine with one.
        TemplateError: sampling with n other than 1.
    """

    def __init__(
        self,
        engine_or_model: Engine | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        policy: ReusePolicy | None = None,
        sampling: SamplingParams | None = None,
        tenant: str = "default",
    ) -> None:
        check_one_answer(sampling, owner="the group")
        self._engine, self._owns_engine = _as_engine(engine_or_model, tokenizer, policy)
        self._renderer = PromptRenderer(self._engine)
        self._graph = AgentGraph(())
        self._sampling = sampling or SamplingParams()
        self._tenant = tenant
        self.policy = policy or self._engine.policy

    def __repr__(self) -> str:
        names = ", ".join(agent.name for agent in self.agents[:MAX_SHOWN]) or "no agents"
        more = f" and {len(self.agents) - MAX_SHOWN} more" if len(self.agents) > MAX_SHOWN else ""
        bound = self.policy.bound
        reuse = "exact" if bound is None else f"up to {bound.max_divergence:g} nats at {bound.confidence:g}"
        return f"KVCommAgentGroup({names}{more}; {reuse}; {self._engine!r})"

    @property
    def engine(self) -> Engine:
        """The engine all agents share."""
        return self._engine

    @property
    def agents(self) -> tuple[Agent, ...]:
        """The agents in the order they were added."""
        return self._graph.agents

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs a run has to be given."""
        return self._graph.inputs

    def add(self, agent: Agent) -> KVCommAgentGroup:
        """Add an agent and return the group. Agents may be added before those they read.

        Raises:
            TemplateError: the name is taken, or the agent closes a cycle; the group stays as it was.
        """
        self._graph = AgentGraph((*self._graph.agents, agent))
        return self

    def run(self, /, rounds: int = 1, **inputs: Input) -> GroupResult:
        """Let every agent answer once a round and return all answers.

        Agents whose inputs are ready run in one batch. In each round every agent answers anew; what it reads
        as `{x}` is of the same round, `{x@previous}` of the round before.

        Args:
            rounds: at least 1.
            inputs: for every placeholder that is not an agent a text, or a list of passages (texts, or segments of
                `Engine.segment`). Each passage is a segment of its own, named as the placeholder: the same ids in any
                order, so that its KV can be moved. Between two of them stands an empty line.

        Raises:
            TemplateError: placeholders, agents and inputs do not fit together. Nothing has run.
            UnknownAdapter: an agent names an adapter that the engine does not have. Nothing has run.
            PromptTooLong: a prompt exceeds the model's limit; names the agent and its largest slots.
            AgentFailed: an agent could not answer; the others were cancelled.
        """
        with closing(self.stream(rounds, **inputs)) as events:
            for event in events:
                if isinstance(event, GroupFinished):
                    return event.result
        raise AssertionError("a run ended without a result or an error")

    def stream(self, /, rounds: int = 1, **inputs: Input) -> Generator[GroupEvent, None, None]:
        """Run the group and yield what happens as it happens; the last event is GroupFinished.

        Inputs are checked now, the run starts with the first event asked for. Closing the iterator (or an
        exception in the loop over it, with `contextlib.closing`) cancels everything in flight. Raises as
        `run` does.
        """
        return _follow(self._plan(rounds, inputs))

    async def arun(self, /, rounds: int = 1, **inputs: Input) -> GroupResult:
        """Like `run`, without blocking the event loop; cancelling the task cancels the run."""
        async with aclosing(self.astream(rounds, **inputs)) as events:
            async for event in events:
                if isinstance(event, GroupFinished):
                    return event.result
        raise AssertionError("a run ended without a result or an error")

    def astream(self, /, rounds: int = 1, **inputs: Input) -> AsyncGenerator[GroupEvent, None]:
        """Like `stream`, as an async generator; `aclose()` cancels everything in flight."""
        return _follow_async(self._plan(rounds, inputs))

    def close(self) -> None:
        """Close the engine if the group made it; an engine that was given stays open."""
        if self._owns_engine:
            self._engine.close()

    def __enter__(self) -> KVCommAgentGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _plan(self, rounds: object, inputs: dict[str, Input]) -> RunPlan:
        if not isinstance(rounds, int) or rounds < 1:
            raise InvalidRequest(f"rounds must be a whole number >= 1, got {rounds!r}")
        self._graph.check_inputs(inputs)
        plan = RunPlan(
            engine=self._engine,
            renderer=self._renderer,
            graph=self._graph,
            prompts={agent.name: self._renderer.render(agent) for agent in self._graph.agents},
            inputs={name: self._renderer.read_input(name, value) for name, value in inputs.items()},
            num_rounds=rounds,
            sampling=self._sampling,
            tenant=self._tenant,
            policy=self.policy,
        )
        plan.check_adapters()
        plan.check_lengths()
        return plan


def _as_engine(
    given: Engine | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, policy: ReusePolicy | None
) -> tuple[Engine, bool]:
    """An engine, and whether it was made here."""
    if hasattr(given, "submit"):
        if tokenizer is not None:
            raise InvalidRequest("an Engine brings its own tokenizer; leave the tokenizer out")
        return cast("Engine", given), False
    if tokenizer is None:
        raise InvalidRequest(
            f"got {type(given).__name__} without a tokenizer; give an Engine, or a model and its tokenizer"
        )
    from kvcomm.engine.engine import Engine

    return Engine(cast("PreTrainedModel", given), tokenizer, policy=policy), True


def _follow(plan: RunPlan) -> Generator[GroupEvent, None, None]:
    events: queue.SimpleQueue[GroupEvent | Failure] = queue.SimpleQueue()
    run = GroupRun(plan, events.put)
    try:
        run.start()
        finished = False
        while not finished:
            event = _raised(events.get())
            yield event
            finished = isinstance(event, GroupFinished)
    finally:
        run.close()


async def _follow_async(plan: RunPlan) -> AsyncGenerator[GroupEvent, None]:
    events: asyncio.Queue[GroupEvent | Failure] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def emit(event: GroupEvent | Failure) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    run = GroupRun(plan, emit)
    try:
        run.start()
        finished = False
        while not finished:
            event = _raised(await events.get())
            yield event
            finished = isinstance(event, GroupFinished)
    finally:
        await asyncio.to_thread(run.close)


def _raised(event: GroupEvent | Failure) -> GroupEvent:
    if isinstance(event, Failure):
        raise event.error
    return event
