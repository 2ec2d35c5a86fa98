"""What a data set has to bring to be evaluated: rows, what a team is asked, and when an answer is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

Row = Mapping[str, Any]


class Score(NamedTuple):
    """How an answer was judged.

    Attributes:
        found: what was read out of the answer; empty: nothing.
        is_right: by the tolerant reading.
        is_strictly_right: only where the answer keeps to the form it was asked for.
    """

    found: str
    is_right: bool
    is_strictly_right: bool


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        hub: data set and configuration on the hub.
        folder: name of the task's folder in a folder of data.
        test, train: splits on the hub, and what their files begin with.
    """

    hub: tuple[str, str]
    folder: str
    test: str = "test"
    train: str = "train"


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
    def num_logprobs(self) -> int | None:
        """How many first tokens of the last agent's answer are looked at; None: only its text."""
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

    def score(self, answer: str, first: Mapping[str, float], row: Row) -> Score:
        """Judge the last agent's answer.

        Args:
            first: log-probabilities of its most probable first tokens, by their text without spaces around.
        """
        ...
