"""Agents that wait read along: their prompts are open, and what others write is read while it is written.

An agent's prompt is opened as soon as the agent itself has nothing else to answer, and holds what is known of it so
far: static text, inputs, answers that there are, and behind them the answer that is being written. What has been read
is a head start and nothing else: the run closes a prompt with all its segments when they are complete, and where
reading along fails, the agent is asked as if there had been none. When something is read, and how much, the engine
decides. A run calls this under its lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvcomm.agents.graph import Task
from kvcomm.agents.run_plan import RunPlan
from kvcomm.agents.templates import Slot
from kvcomm.errors import KVCommError
from kvcomm.memory.segments import Segment

if TYPE_CHECKING:
    from kvcomm.agents.results import AgentResult
    from kvcomm.engine.handle import RequestHandle
    from kvcomm.engine.open_prompt import OpenPrompt
    from kvcomm.engine.sampling import SamplingParams


@dataclass
class OpenTask:
    """A task that reads along.

    Attributes:
        prompt: what the task has been given so far.
        parts: of its rendered prompt, those that it has not been given yet.
    """

    prompt: OpenPrompt
    parts: deque[Segment | Slot]


class ReadingAlong:
    """The open prompts of one run. Each is closed or cancelled."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self._open: dict[Task, OpenTask] = {}
        self._left_out: set[Task] = set()

    def advance(
        self, pending: Collection[Task], handles: Mapping[Task, RequestHandle], results: Mapping[Task, AgentResult]
    ) -> None:
        """Open what is to be read along from now on, and give every open prompt what has become known.

        Does nothing in a run that does not read along.

        Args:
            pending: tasks that wait.
            handles: of answers that are being written.
            results: answers that there are.
        """
        if not self._plan.read_along:
            return
        for task in pending:
            if task not in self._open and task not in self._left_out and self._is_next(task, pending):
                self._begin(task)
        for task, reader in list(self._open.items()):
            try:
                self._give(task, reader, handles, results)
            except KVCommError:  # whatever is wrong, the agent's request will tell
                self._leave_out(task)

    def close(self, task: Task, sampling: SamplingParams, prompt: tuple[Segment, ...]) -> RequestHandle | None:
        """Ask for a task's answer to its whole prompt; None: nothing has been read along, or it has been given up."""
        reader = self._open.pop(task, None)
        if reader is None:
            return None
        try:
            with reader.prompt:
                return reader.prompt.close(sampling, prompt=prompt)
        except KVCommError:  # it took too long, or an answer was too long before a stop string cut it
            return None

    def cancel(self) -> None:
        """Cancel all open prompts."""
        while self._open:
            self._open.popitem()[1].prompt.cancel()

    def _is_next(self, task: Task, pending: Collection[Task]) -> bool:
        """Whether a task reads answers, and is the next of its agent: an agent has one open prompt at most."""
        slots = self._plan.graph.agent(task.agent).slots
        reads = any(self._plan.source_of(slot, task) is not None for slot in slots)
        return reads and task._replace(round=task.round - 1) not in pending

    def _begin(self, task: Task) -> None:
        plan, adapter = self._plan, self._plan.graph.agent(task.agent).adapter
        try:
            prompt = plan.engine.open_prompt(adapter=adapter, tenant=plan.tenant, policy=plan.policy)
        except KVCommError:
            self._left_out.add(task)
        else:
            self._open[task] = OpenTask(prompt, deque(plan.prompts[task.agent].parts))

    def _leave_out(self, task: Task) -> None:
        self._open.pop(task).prompt.cancel()
        self._left_out.add(task)

    def _give(
        self,
        task: Task,
        reader: OpenTask,
        handles: Mapping[Task, RequestHandle],
        results: Mapping[Task, AgentResult],
    ) -> None:
        """Give a prompt its parts in order, up to the first answer that nobody has begun to write."""
        while reader.parts:
            part = reader.parts[0]
            source = self._plan.source_of(part, task) if isinstance(part, Slot) else None
            if isinstance(part, Slot) and source is not None and source not in results:
                if source not in handles:
                    return
                reader.prompt.follow(handles[source], name=part.label, keep=self._kept(source))
            else:
                known = self._plan.fill(part, task, results)
                if any(segment.token_ids for segment in known):  # not a slot that nothing stands in
                    reader.prompt.append(known)
            reader.parts.popleft()

    def _kept(self, source: Task) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
        """What of an answer's ids its readers get."""
        return partial(self._plan.answer_of, self._plan.graph.agent(source.agent))
