"""What a run keeps of every question in every mode."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.tasks.records import RecordFile
from eval.tasks.task import Score
from kvcomm import Segment, Usage

Prompt = tuple[tuple[tuple[int, ...], str | None], ...]
"""(token ids, name of the slot or None) of every segment."""


@dataclass(frozen=True)
class Answer:
    """One agent's answer in one mode.

    Attributes:
        token_ids: as decoded, without the end of turn.
        usage: counts of tokens, reasons, and how text was moved, if it was.
        prompt: only in the dense run; the other modes get the same.
        result: what a tool made of the answer, with how it is announced; only in the dense run.
        first: log-probabilities of the texts that the task looks at, as first token.
    """

    token_ids: tuple[int, ...]
    text: str
    usage: Mapping[str, Any]
    prompt: Prompt = ()
    result: tuple[int, ...] = ()
    first: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed_on(self) -> tuple[int, ...]:
        """What readers get: the answer as it was decoded, and behind it what a tool made of it."""
        return self.token_ids + self.result

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The prompt."""
        return tuple(Segment(token_ids, name) for token_ids, name in self.prompt)


@dataclass(frozen=True)
class Sample:
    """One question in one mode.

    Attributes:
        index: of its row.
        answers: agent -> answer, in the order in which they answered.
        extra: the row's group; how many further answers were drawn and how many of them are right.
    """

    index: int
    answers: Mapping[str, Answer]
    score: Score | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def usage_values(usage: Usage) -> dict[str, Any]:
    """A request's usage as JSON values."""
    report = usage.approximation
    moved = None if report is None else {k: _finite(v) for k, v in report._asdict().items()}
    if moved is not None:
        moved["level"] = None if usage.bound is None else usage.bound.level
    return {
        "prompt": usage.prompt_tokens,
        "exact": usage.exact_tokens,
        "aligned": usage.aligned_tokens,
        "computed": usage.computed_tokens,
        "generated": usage.generated_tokens,
        "reasons": dict(usage.reasons),
        "moved": moved,
    }


class SampleFile(RecordFile[Sample]):
    """The samples of one mode."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, _sample)

    def by_index(self) -> dict[int, Sample]:
        """Every sample by its row's index."""
        return {sample.index: sample for sample in self.read()}


def _sample(value: dict[str, Any]) -> Sample:
    answers = {name: _answer(each) for name, each in value["answers"].items()}
    score = None if value["score"] is None else Score(*value["score"])
    return Sample(value["index"], answers, score, value["extra"])


def _answer(value: dict[str, Any]) -> Answer:
    prompt = tuple((tuple(token_ids), name) for token_ids, name in value["prompt"])
    return Answer(
        **{**value, "token_ids": tuple(value["token_ids"]), "result": tuple(value["result"]), "prompt": prompt}
    )


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
