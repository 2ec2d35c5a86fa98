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
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcomm.agents.graph import Task
from kvcomm.agents.reading_along import ReadingAlong
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
from kvcomm.agents.run_plan import RunPlan
from kvcomm.errors import AgentFailed, KVCommError, PromptTooLong
from kvcomm.memory.segments import Segment

if TYPE_CHECKING:
    from kvcomm.engine.handle import RequestHandle
    from kvcomm.engine.results import Completion


@dataclass(frozen=True)
class FailedRun:
    """The last thing a failed run reports; the reader raises the error."""

    error: KVCommError


Emit = Callable[[GroupEvent | FailedRun], None]


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
            self._emit(FailedRun(error))

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
    events: queue.SimpleQueue[GroupEvent | FailedRun] = queue.SimpleQueue()
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
    events: asyncio.Queue[GroupEvent | FailedRun] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def emit(event: GroupEvent | FailedRun) -> None:
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


def raised(event: GroupEvent | FailedRun) -> GroupEvent:
    """The event; raises the error of a failure."""
    if isinstance(event, FailedRun):
        raise event.error
    return event
