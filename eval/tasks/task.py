"""What a data set has to bring to be evaluated: rows, what a team is asked, and when an answer is right."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from eval.sandbox import Isolation

Row = Mapping[str, Any]


class Score(NamedTuple):
    """How an answer was judged.

    Attributes:
        found: what was read out of the answer; empty: nothing.
        is_right: by the reading that counts.
        is_right_otherwise: by the task's second reading; see `Task.readings`.
    """

    found: str
    is_right: bool
    is_right_otherwise: bool


class Split(NamedTuple):
    """Some rows of a data set: the split's name on the hub, and what the names of its files begin with."""

    hub: str
    file: str


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        hub: data set and configuration on the hub.
        folder: name of the task's folder in a folder of data.
        test, train: rows to ask, rows to learn from. The same: what is asked is left out of what is learned from.
        fields: what every row has.
    """

    hub: tuple[str, str]
    folder: str
    test: Split
    train: Split
    fields: tuple[str, ...]


class Task(Protocol):
    """One data set."""

    @property
    def name(self) -> str:
        """For files and people."""
        ...

    @property
    def team(self) -> str:
        """The packaged team that works on it."""
        ...

    @property
    def source(self) -> Source:
        """Where its rows are."""
        ...

    @property
    def readings(self) -> tuple[str, str]:
        """How answers are read, for people: the reading that counts, and the second one."""
        ...

    @property
    def first_texts(self) -> tuple[str, ...]:
        """Texts whose log-probability as the last agent's first token is looked at; empty: only its answer counts."""
        ...

    @property
    def tools(self) -> Mapping[str, str]:
        """Agents whose answer a tool works on, and how its result is announced; it stands behind the answer."""
        ...

    def isolation(self, agents: Collection[str]) -> Isolation | None:
        """How programs that these agents write are kept apart when they are run; None: none are run.

        Raises:
            NoIsolation: they would be run, and the system has no way to keep them apart.
        """
        ...

    def group(self, row: Row) -> str:
        """What accuracies are also given by, such as a subject; empty: nothing."""
        ...

    def arrange(self, rows: Sequence[Row]) -> list[Row]:
        """Rows in the order in which they are taken."""
        ...

    def inputs(self, row: Row) -> Mapping[str, str]:
        """What the team is asked: the inputs of its agents.

        Raises:
            KeyError: the row lacks a field.
        """
        ...

    def use_tool(self, agent: str, answer: str, row: Row) -> str:
        """What the tool of one of `tools` gives for an agent's answer; never empty."""
        ...

    def score(self, answer: str, first: Mapping[str, float], row: Row) -> Score:
        """Judge the last agent's answer.

        Args:
            first: log-probabilities of `first_texts`, as far as they are among the most probable first tokens.
        """
        ...
