"""Many runs of a team: example inputs for them, the runs themselves, and letting an engine read what they gave.

`KVCommAgentGroup.warm` learns from examples by itself; what is here serves evaluations and tuning, which keep runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from kvcomm.agents.group import KVCommAgentGroup
from kvcomm.agents.results import GroupResult
from kvcomm.agents.team import Team
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import InvalidRequest
from kvcomm.files.reading import BadContent, read_lines, read_text
from kvcomm.memory.segments import Segment
from kvcomm.reuse.policy import ReusePolicy

if TYPE_CHECKING:
    from kvcomm.engine.engine import Engine

EXAMPLES = "word_problems.txt"

BATCH = 16
"""Runs that are computed at the same time."""

Note = Callable[[str], None]


def require_no_adapters(team: Team) -> None:
    """Raise InvalidRequest for a team of which an agent has an adapter: what is learned here is learned without."""
    for agent in team.agents:
        if agent.adapter is not None:
            raise InvalidRequest(
                f"agent {agent.name!r} has the adapter {agent.adapter!r}; teams with adapters cannot be tuned: "
                "warm them up with group.warm, or let their requests teach under a policy that allows it"
            )


def limited(team: Team, max_new_tokens: int) -> Team:
    """The team with greedy answers of a given length at most."""
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    return replace(team, agents=tuple(replace(agent, sampling=sampling) for agent in team.agents))


def examples(team: Team, file: str | Path | None = None) -> list[dict[str, str]]:
    """Inputs of runs for a team with one input: lines of a file, else the word problems that come with kvcomm.

    A line is the text itself, or in a .jsonl file an object with the field "question".

    Raises:
        InvalidRequest: the team needs other inputs, or the file cannot be used; names the line.
    """
    names = team.required_inputs
    if len(names) != 1:
        raise InvalidRequest(f"team {team.name!r} needs the inputs {', '.join(names)}; examples give one")
    return [{names[0]: text} for text in _texts(None if file is None else Path(file))]


def _texts(file: Path | None) -> list[str]:
    if file is None:
        content = (files("kvcomm.agents") / "teams" / EXAMPLES).read_text(encoding="utf-8")
        return content.splitlines()
    try:
        if file.suffix != ".jsonl":
            return [line for line in read_text(file).splitlines() if line.strip()]
        return [str(value["question"]) for _, value in read_lines(file)]
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror or error}") from error
    except (BadContent, KeyError, TypeError) as error:
        raise InvalidRequest(f'{file} needs an object with the text "question" in every line: {error}') from error


def run_all(
    group: KVCommAgentGroup, inputs: Sequence[Mapping[str, str]], team: Team, note: Note = lambda text: None
) -> list[GroupResult]:
    """Run a team on many inputs, some of them at the same time; results in order."""
    results: list[GroupResult] = []
    for first in range(0, len(inputs), BATCH):
        batch = inputs[first : first + BATCH]
        note(f"answering {first + 1} to {first + len(batch)} of {len(inputs)}")
        with ThreadPoolExecutor(len(batch)) as threads:
            runs = threads.map(lambda each: group.run(rounds=team.rounds, **{**team.inputs, **each}), batch)
            results += list(runs)
    return results


def publish(engine: Engine, readings: Iterable[tuple[Sequence[Segment], Sequence[int]]]) -> None:
    """Let an engine read prompts and answers exactly, one after the other, so that their segments can be moved.

    In this order: the first reader of a text is the source for the others.
    """
    for prompt, token_ids in readings:
        answer = (Segment(tuple(token_ids), "answer"),) if token_ids else ()
        engine.context((*prompt, *answer), policy=ReusePolicy.exact()).release()
