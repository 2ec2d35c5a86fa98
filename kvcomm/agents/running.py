"""One run of a group: submits every agent the moment its inputs are finished and reports what happens.

One thread per agent in flight waits for its tokens; the thread that finishes an agent also submits the agents
that were waiting for it, so progress does not depend on how fast events are read. Agents that are ready together are
submitted before the engine takes its next step, so they share a batch from their first token on. After `close()` or a
failure nothing of the run is in flight, nothing is submitted any more, and every thread has ended. Agents that wait
read along (`kvcomm.agents.reading_along`), if the run is to. A run knows the engine only through `submit`,
`open_prompt` and its lock.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcomm.agents.agent import Agent
from kvcomm.agents.graph import AgentGraph, Task
from kvcomm.agents.reading_along import ReadingAlong
from kvcomm.agents.rendering import Filling, PromptRenderer, RenderedPrompt
from kvcomm.agents.results import (
    AgentFinished,
    AgentResult,
    AgentStarted,
    AgentText,
    GroupEvent,
    GroupFinished,
    GroupResult,
    Round,
    RoundFinished,
)
from kvcomm.agents.templates import Slot
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import AgentFailed, InvalidRequest, KVCommError, PromptTooLong, UnknownAdapter
from kvcomm.memory.segments import Segment
from kvcomm.reuse.policy import ReusePolicy

if TYPE_CHECKING:
    from kvcomm.engine.engine import Engine
    from kvcomm.engine.handle import RequestHandle
    from kvcomm.engine.results import Completion
    from kvcomm.engine.warming import Lessons

NUM_SLOTS_NAMED = 3  # in the error about a prompt that is too long


@dataclass(frozen=True)
class Failure:
    """The last thing a failed run reports; the reader raises the error."""

    error: KVCommError


Emit = Callable[[GroupEvent | Failure], None]


@dataclass(frozen=True)
class RunPlan:
    """Everything a run needs, checked and tokenized before anything is computed.

    Attributes:
        prompts: agent name -> its rendered prompt.
        inputs: input name -> token ids of its texts.
        num_rounds: rounds to run, at least 1.
        sampling: for agents that bring none of their own.
        lessons: takes what is to be learned from every request, which is served exactly then; None: requests teach as
            the policy says.
        read_along: whether agents that wait read along; not where lessons are taken.
    """

    engine: Engine
    renderer: PromptRenderer
    graph: AgentGraph
    prompts: Mapping[str, RenderedPrompt]
    inputs: Mapping[str, Filling]
    num_rounds: int
    sampling: SamplingParams
    tenant: str
    policy: ReusePolicy
    lessons: Lessons | None = None
    read_along: bool = False

    def check_adapters(self) -> None:
        """Raise UnknownAdapter for an agent whose adapter the engine does not have."""
        wanted = {agent.adapter: agent.name for agent in self.graph.agents if agent.adapter is not None}
        known = self.engine.adapters if wanted else ()
        for adapter, name in wanted.items():
            if adapter not in known:
                listed = ", ".join(known) or "none"
                raise UnknownAdapter(f"agent {name!r}: the engine has no adapter {adapter!r}; loaded: {listed}")

    def check_grammars(self) -> None:
        """Raise InvalidRequest for an agent whose answers cannot be held to what it wants."""
        for agent in self.graph.agents:
            grammar = self.sampling_of(agent).grammar
            if grammar is not None:
                try:
                    self.engine.compile_grammar(grammar, tenant=self.tenant)
                except InvalidRequest as error:
                    raise InvalidRequest(f"agent {agent.name!r}: {error}") from error

    def check_lengths(self) -> None:
        """Raise PromptTooLong for a prompt that is too long even if every agent it reads says nothing."""
        for agent in self.graph.agents:
            self.prompt_of(agent, Task(agent.name, 1), {})

    def sampling_of(self, agent: Agent) -> SamplingParams:
        """The agent's own sampling, or the group's; with the agent's own grammar."""
        return agent.sampled_by(self.sampling)

    def prompt_of(self, agent: Agent, task: Task, results: Mapping[Task, AgentResult]) -> tuple[Segment, ...]:
        """The agent's prompt from the inputs and the answers there are.

        Raises:
            PromptTooLong: prompt and answer exceed the model's limit; names the agent and the largest slots.
        """
        values = {slot: self._value(slot, task, results) for slot in agent.slots}
        prompt = self.prompts[agent.name].fill(values)
        num_tokens = sum(len(segment.token_ids) for segment in prompt)
        room = self.engine.max_context - self.sampling_of(agent).max_new_tokens
        if num_tokens > room:
            raise PromptTooLong(self._describe_excess(agent, num_tokens, values))
        return prompt

    def answer_of(self, agent: Agent, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """What readers get of the ids that an agent's answer ended with."""
        return self.renderer.strip_end(token_ids, self.sampling_of(agent).stop_token_ids)

    def source_of(self, slot: Slot, task: Task) -> Task | None:
        """Whose answer fills a slot; None: an input does, or nothing, since there is no round before."""
        if not slot.previous and slot.name in self.inputs:
            return None
        source = Task(slot.name, task.round - slot.previous)
        return source if source.round else None

    def fill(self, part: Segment | Slot, task: Task, results: Mapping[Task, AgentResult]) -> tuple[Segment, ...]:
        """The segments of one part of a task's prompt, from the inputs and the answers there are."""
        values = {part: self._value(part, task, results)} if isinstance(part, Slot) else {}
        return self.prompts[task.agent].fill_part(part, values)

    def _value(self, slot: Slot, task: Task, results: Mapping[Task, AgentResult]) -> Filling:
        source = self.source_of(slot, task)
        if source is None:
            return () if slot.previous else self.inputs[slot.name]
        return (results[source].token_ids,) if source in results else ()

    def _describe_excess(self, agent: Agent, num_tokens: int, values: Mapping[Slot, Filling]) -> str:
        lengths = {slot: sum(map(len, texts)) for slot, texts in values.items()}
        largest = sorted(lengths.items(), key=lambda item: -item[1])[:NUM_SLOTS_NAMED]
        slots = ", ".join(f"{slot.placeholder} {length}" for slot, length in largest) or "none"
        return (
            f"agent {agent.name!r}: its prompt of {num_tokens} tokens plus "
            f"max_new_tokens={self.sampling_of(agent).max_new_tokens} exceeds the model's "
            f"{self.engine.max_context} tokens; largest slots: {slots}"
        )


class GroupRun:
    """The moving part of one run. Every method may be called from any thread.

    Law: each task is pending, in flight or finished, and in exactly one of these; a task leaves `pending`
    only when all that it needs is finished.
    """

    def __init__(self, plan: RunPlan, emit: Emit) -> None:
        self._plan = plan
        self._emit = emit
        self._lock = threading.RLock()
        self._agents = {agent.name: agent for agent in plan.graph.agents}
        rounds = range(1, plan.num_rounds + 1)
        tasks = [Task(name, round) for round in rounds for name in self._agents]
        self._pending = {task: plan.graph.needs(task) for task in tasks}
        self._handles: dict[Task, RequestHandle] = {}
        self._results: dict[Task, AgentResult] = {}
        self._threads: list[threading.Thread] = []
        self._along = ReadingAlong(plan)
        self._stopped = False
        self._began_s = time.monotonic()

    def start(self) -> None:
        """Submit every agent that waits for nobody."""
        with self._lock:
            self._submit_ready()

    def close(self) -> None:
        """Cancel what is in flight and wait until it has ended. Does nothing after the run has finished."""
        self._stop()
        while self._threads:
            self._threads[-1].join()
            self._threads.pop()

    def _stop(self) -> bool:
        """Cancel what is in flight or reads along; whether this call was the first to stop the run."""
        with self._lock:
            first, self._stopped = not self._stopped, True
            self._along.cancel()
            for handle in self._handles.values():
                handle.cancel()
            return first

    def _submit_ready(self) -> None:
        ready = [task for task, needs in self._pending.items() if needs <= self._results.keys()]
        with self._plan.engine.lock:
            for task in ready:
                if self._stopped:
                    return
                try:
                    prompt = self._plan.prompt_of(self._agents[task.agent], task, self._results)
                except PromptTooLong as error:  # names the agent itself
                    self._fail(error)
                    return
                try:
                    self._submit(task, prompt)
                except Exception as error:  # reported to the reader, who raises it
                    self._fail(AgentFailed(*task, error))
            if not self._stopped:
                self._along.advance(self._pending, self._handles, self._results)

    def _submit(self, task: Task, prompt: tuple[Segment, ...]) -> None:
        started_s = self._now_s()
        handle = self._ask(task, prompt)
        del self._pending[task]
        self._handles[task] = handle
        self._emit(AgentStarted(*task, sum(len(segment.token_ids) for segment in prompt)))
        thread = threading.Thread(
            target=self._follow,
            args=(task, handle, prompt, started_s),
            name=f"kvcomm-agent-{task.agent}-{task.round}",
            daemon=True,
        )
        thread.start()
        self._threads.append(thread)

    def _ask(self, task: Task, prompt: tuple[Segment, ...]) -> RequestHandle:
        """Submit a prompt, with what has been read of it along if something has."""
        plan, agent = self._plan, self._agents[task.agent]
        sampling = plan.sampling_of(agent)
        handle = self._along.close(task, sampling, prompt)
        if handle is not None:
            return handle
        if plan.lessons is None:
            return plan.engine.submit(prompt, sampling, adapter=agent.adapter, tenant=plan.tenant, policy=plan.policy)
        lesson = plan.lessons.begin(prompt, agent.adapter)
        return plan.engine.submit(prompt, sampling, adapter=agent.adapter, tenant=plan.tenant, lesson=lesson)

    def _follow(self, task: Task, handle: RequestHandle, prompt: tuple[Segment, ...], started_s: float) -> None:
        try:
            for chunk in handle:
                if chunk.text or chunk.token_ids:
                    self._emit(AgentText(*task, chunk.text, tuple(chunk.token_ids)))
            self._finish(task, self._result(task, handle.result(), prompt, started_s))
        except Exception as error:  # reported to the reader, who raises it
            self._fail(AgentFailed(*task, error))

    def _result(self, task: Task, completion: Completion, prompt: tuple[Segment, ...], started_s: float) -> AgentResult:
        return AgentResult(
            name=task.agent,
            round=task.round,
            text=completion.text,
            token_ids=self._plan.answer_of(self._agents[task.agent], completion.token_ids),
            prompt=prompt,
            usage=completion.usage,
            finish_reason=completion.finish_reason,
            started_s=started_s,
            finished_s=self._now_s(),
        )

    def _finish(self, task: Task, result: AgentResult) -> None:
        with self._lock:
            del self._handles[task]
            self._results[task] = result
            self._emit(AgentFinished(*task, result))
            answers = self._round(task.round)
            if len(answers) == len(self._agents):
                self._emit(RoundFinished(task.round, answers))
            if len(self._results) == len(self._agents) * self._plan.num_rounds:
                self._emit(GroupFinished(self._group_result(result.finished_s)))
            self._submit_ready()

    def _fail(self, error: KVCommError) -> None:
        """Stop the run and report why. If it was stopped already, the error only follows from that."""
        if self._stop():
            self._emit(Failure(error))

    def _round(self, number: int) -> Round:
        tasks = [Task(name, number) for name in self._agents]
        return {task.agent: self._results[task] for task in tasks if task in self._results}

    def _group_result(self, total_s: float) -> GroupResult:
        rounds = tuple(self._round(number) for number in range(1, self._plan.num_rounds + 1))
        return GroupResult(rounds, self._plan.graph.final, total_s)

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s


def follow(plan: RunPlan) -> Generator[GroupEvent, None, None]:
    """Run a plan and yield what happens; the last event is GroupFinished. Raises what ends the run early."""
    events: queue.SimpleQueue[GroupEvent | Failure] = queue.SimpleQueue()
    run = GroupRun(plan, events.put)
    try:
        run.start()
        finished = False
        while not finished:
            event = raised(events.get())
            yield event
            finished = isinstance(event, GroupFinished)
    finally:
        run.close()


async def follow_async(plan: RunPlan) -> AsyncGenerator[GroupEvent, None]:
    """The same as an async generator."""
    events: asyncio.Queue[GroupEvent | Failure] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def emit(event: GroupEvent | Failure) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    run = GroupRun(plan, emit)
    try:
        run.start()
        finished = False
        while not finished:
            event = raised(await events.get())
            yield event
            finished = isinstance(event, GroupFinished)
    finally:
        await asyncio.to_thread(run.close)


def raised(event: GroupEvent | Failure) -> GroupEvent:
    """The event; raises the error of a failure."""
    if isinstance(event, Failure):
        raise event.error
    return event
