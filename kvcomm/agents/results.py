"""What a group's run gives back: events while it goes on, results when it is done.

Plain immutable values. Rounds are counted from 1; times are seconds since the run began.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvcomm import pictures
from kvcomm.memory.segments import Segment
from kvcomm.plain import Plain, plain, short

if TYPE_CHECKING:
    from kvcomm.engine.results import Usage


@dataclass(frozen=True)
class AgentResult(Plain):
    """One answer of one agent.

    Attributes:
        name, round: whose answer, in which round.
        text: the answer as text, without control tokens.
        token_ids: the ids that readers get: as decoded, without the end-of-turn token.
        prompt: the segments the agent was given.
        usage: token counts and engine timings of this request.
        finish_reason: why generation ended, as the engine names it.
        started_s, finished_s: submission and completion, seconds since the run began.
    """

    name: str
    round: int
    text: str
    token_ids: tuple[int, ...]
    prompt: tuple[Segment, ...]
    usage: Usage
    finish_reason: str
    started_s: float
    finished_s: float

    def __repr__(self) -> str:
        took_s = self.finished_s - self.started_s
        usage = f"{self.prompt_tokens} prompt, {len(self.token_ids)} own tokens"
        where = f"{self.name}, round {self.round}"
        return f"AgentResult({where}: {short(self.text)}, {self.finish_reason}, {usage}, {took_s:.3g} s)"

    @property
    def prompt_tokens(self) -> int:
        """Number of prompt tokens."""
        return self.usage.prompt_tokens


MAX_SHOWN = 3
Round = Mapping[str, AgentResult]


class GroupResult(Mapping[str, AgentResult]):
    """All answers of a run; as a mapping, agent name -> its answer of the last round.

    Attributes:
        rounds: one mapping a round, first round first.
        final: the last round's answers that no agent of the same round reads, in the order the agents were
            added.
        total_s: seconds from the start of the run to its last answer.
    """

    def __init__(self, rounds: tuple[Round, ...], final: tuple[str, ...], total_s: float) -> None:
        self.rounds = tuple(MappingProxyType(dict(answers)) for answers in rounds)
        self.final = tuple(self.rounds[-1][name] for name in final)
        self.total_s = total_s

    def __reduce__(self) -> tuple[type[GroupResult], tuple[tuple[Round, ...], tuple[str, ...], float]]:
        # Read-only views cannot be pickled or copied.
        rounds = tuple(dict(answers) for answers in self.rounds)
        return type(self), (rounds, tuple(answer.name for answer in self.final), self.total_s)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: `rounds`, each agent name -> answer; `final`, names of agents; `total_s`."""
        final = [answer.name for answer in self.final]
        return {"rounds": plain(self.rounds), "final": final, "total_s": plain(self.total_s)}

    def __getitem__(self, name: str) -> AgentResult:
        return self.rounds[-1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rounds[-1])

    def __len__(self) -> int:
        return len(self.rounds[-1])

    def _repr_html_(self) -> str:
        several = len(self.rounds) > 1
        rows = [
            [
                escape(f"{answer.name}, round {answer.round}" if several else answer.name),
                pictures.bar(answer.usage.sources),
                f"{answer.usage.ttft_s:.3g} s",
                pictures.shown(answer.text),
            ]
            for answers in self.rounds
            for answer in answers.values()
        ]
        return pictures.table(["agent", "prompt", "first token", "answer"], rows)

    def __repr__(self) -> str:
        shown = [f"{answer.name}: {short(answer.text)}" for answer in self.final[:MAX_SHOWN]]
        if len(self.final) > MAX_SHOWN:
            shown.append(f"and {len(self.final) - MAX_SHOWN} more")
        rounds = f"{len(self.rounds)} rounds, " if len(self.rounds) > 1 else ""
        return f"GroupResult({', '.join(shown)}; {len(self)} agents, {rounds}{self.total_s:.3g} s)"


@dataclass(frozen=True)
class AgentStarted:
    """An agent's inputs were complete and its prompt went to the engine."""

    agent: str
    round: int
    num_prompt_tokens: int


@dataclass(frozen=True)
class AgentText:
    """A piece of an answer as it is decoded; the pieces concatenated are the answer's text."""

    agent: str
    round: int
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class AgentFinished:
    """An agent answered."""

    agent: str
    round: int
    result: AgentResult


@dataclass(frozen=True)
class RoundFinished:
    """Every agent answered in this round; agents of the next round may have started before."""

    round: int
    results: Round

    def __reduce__(self) -> tuple[type[RoundFinished], tuple[int, Round]]:
        return type(self), (self.round, dict(self.results))


@dataclass(frozen=True)
class GroupFinished:
    """The last event of a run."""

    result: GroupResult


GroupEvent = AgentStarted | AgentText | AgentFinished | RoundFinished | GroupFinished
"""What `KVCommAgentGroup.stream` yields."""
