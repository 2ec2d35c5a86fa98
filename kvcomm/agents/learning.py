"""What a group's agents know about moving text, and how they learn it from examples before anybody waits.

The requests of an agent are those of one reader (`kvcomm.align.readers`): its rendered template, whatever its slots
hold. Nothing of a warm-up is in flight when it ends, however it ends.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kvcomm.agents.agent import Agent
from kvcomm.agents.graph import AgentGraph
from kvcomm.agents.rendering import RenderedPrompt
from kvcomm.agents.results import AgentFinished, GroupEvent, GroupFinished
from kvcomm.agents.run_plan import RunPlan
from kvcomm.agents.running import FailedRun, GroupRun, raised
from kvcomm.align.readers import reader_of
from kvcomm.engine.sampling import SamplingParams
from kvcomm.engine.warming import Gained, Lessons, Tell
from kvcomm.memory.segments import Segment
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.replay import NUM_CONTINUATION

if TYPE_CHECKING:
    from kvcomm.engine.engine import Engine

MAX_RUNS = 8
"""Examples that are answered at the same time."""
MAX_LESSONS = 48
"""Requests among them that wait to be learned from: an engine keeps no more than a few dozen."""


def warm(plans: Sequence[RunPlan], policy: ReusePolicy, tell: Tell) -> dict[str, Gained]:
    """Run examples exactly and learn from every prompt of theirs; what each agent has gained that reads anything.

    Args:
        plans: of runs of the same agents, at least one.

    Raises:
        AgentFailed: an agent could not answer; what was learned before stays.
        EngineClosed: the engine was closed meanwhile.
    """
    first = plans[0]
    num_requests = len(first.graph.agents) * first.num_rounds
    lessons = Lessons(first.engine.reuse, policy, tell, num_total=num_requests * len(plans), tenant=first.tenant)
    graph = AgentGraph(shortened(first.graph.agents))
    plans = [replace(plan, graph=graph, lessons=lessons, read_along=False) for plan in plans]
    num_runs = max(1, min(MAX_RUNS, MAX_LESSONS // num_requests))
    for start in range(0, len(plans), num_runs):
        _run(plans[start : start + num_runs], lessons)
        lessons.wait()
        first.engine.require_open()
    gained = lessons.gained()
    found = {}
    for agent in first.graph.agents:
        reader = reader_of(empty_prompt(first.engine, first.prompts[agent.name]))
        if (agent.adapter, reader.digest) in gained:
            found[agent.name] = gained[agent.adapter, reader.digest]
    return found


def shortened(agents: Sequence[Agent]) -> tuple[Agent, ...]:
    """The same agents, where answers that nobody reads end after the tokens by which a divergence is measured."""
    read = {slot.name for agent in agents for slot in agent.slots}
    return tuple(agent if agent.name in read else _shorter(agent) for agent in agents)


def _shorter(agent: Agent) -> Agent:
    sampling = agent.sampling or SamplingParams()
    return replace(agent, sampling=replace(sampling, max_new_tokens=min(sampling.max_new_tokens, NUM_CONTINUATION)))


def empty_prompt(engine: Engine, prompt: RenderedPrompt) -> tuple[Segment, ...]:
    """An agent's prompt with nothing in its slots, as the engine reads it."""
    return engine.read_prompt(prompt.fill({}), is_start=True)


def _run(plans: Sequence[RunPlan], lessons: Lessons) -> None:
    events: queue.SimpleQueue[GroupEvent | FailedRun] = queue.SimpleQueue()
    runs = [GroupRun(plan, events.put) for plan in plans]
    try:
        for run in runs:
            run.start()
        num_left = len(runs)
        while num_left:
            event = raised(events.get())
            if isinstance(event, AgentFinished):
                lessons.answered()
            num_left -= isinstance(event, GroupFinished)
    finally:
        for run in runs:
            run.close()
