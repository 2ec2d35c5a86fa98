"""What a run keeps of every question, line by line, so that it can be interrupted, resumed and looked at afterwards."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from eval.tasks.task import Score
from kvcomm.agents.results import AgentResult
from kvcomm.engine.results import Usage
from kvcomm.errors import InvalidRequest
from kvcomm.memory.segments import Segment


@dataclass(frozen=True)
class Answer:
    """One agent's answer in one mode.

    Attributes:
        prompt: (token ids, name of the slot or None) of every segment.
        usage: counts of tokens, reasons, seconds to the first token and in all, and how text was moved, if it was.
        first: log-probabilities of the most probable first tokens, by text; only where a task looks at them.
        divergence, agreement: from the dense answer, teacher-forced over its first tokens; None: not measured.
    """

    token_ids: tuple[int, ...]
    text: str
    usage: Mapping[str, Any]
    prompt: tuple[tuple[tuple[int, ...], str | None], ...] = ()
    first: Mapping[str, float] = field(default_factory=dict)
    divergence: float | None = None
    agreement: float | None = None

    @classmethod
    def of(cls, result: AgentResult) -> Self:
        """From a group's run, with its prompt."""
        prompt = tuple((segment.token_ids, segment.name) for segment in result.prompt)
        return cls(result.token_ids, result.text, usage_values(result.usage), prompt)

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
        total_s: seconds from the first request to the last answer, other questions beside it included.
    """

    index: int
    answers: Mapping[str, Answer]
    total_s: float
    score: Score | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def usage_values(usage: Usage) -> dict[str, Any]:
    """A request's usage as JSON values."""
    report = usage.approximation
    moved = None if report is None else {k: _finite(v) for k, v in report._asdict().items()}
    return {
        "prompt": usage.prompt_tokens,
        "exact": usage.exact_tokens,
        "aligned": usage.aligned_tokens,
        "computed": usage.computed_tokens,
        "generated": usage.generated_tokens,
        "reasons": dict(usage.reasons),
        "ttft_s": usage.ttft_s,
        "total_s": usage.total_s,
        "moved": moved,
    }


class SampleFile:
    """The samples of one mode, in the order in which they were finished."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> dict[int, Sample]:
        """Every sample by its row's index; a last line that was cut off is left out.

        Raises:
            InvalidRequest: another line is damaged; names it.
        """
        if not self.file.exists():
            return {}
        lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
        samples = {}
        for number, line in enumerate(lines, start=1):
            try:
                sample = _sample(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):
                    break
                raise InvalidRequest(f"{self.file}, line {number}: not a sample ({error!r})") from error
            samples[sample.index] = sample
        return samples

    def add(self, samples: Iterable[Sample]) -> None:
        """Append samples."""
        self._mend()
        with self.file.open("a", encoding="utf-8") as out:
            for sample in samples:
                out.write(json.dumps(asdict(sample), separators=(",", ":")) + "\n")

    def replace(self, samples: Iterable[Sample]) -> None:
        """Write all of them anew."""
        partial = self.file.with_suffix(".part")
        partial.write_text("".join(json.dumps(asdict(each), separators=(",", ":")) + "\n" for each in samples))
        partial.replace(self.file)

    def _mend(self) -> None:
        """Drop a last line that was cut off."""
        if self.file.exists() and not self.file.read_bytes().endswith(b"\n"):
            content = self.file.read_bytes()
            self.file.write_bytes(content[: content.rfind(b"\n") + 1])


def batches(indices: Iterable[int], size: int) -> Iterator[list[int]]:
    """Consecutive groups of at most `size`."""
    left = list(indices)
    for first in range(0, len(left), size):
        yield left[first : first + size]


def _sample(value: dict[str, Any]) -> Sample:
    answers = {name: _answer(each) for name, each in value["answers"].items()}
    score = None if value["score"] is None else Score(*value["score"])
    return Sample(value["index"], answers, value["total_s"], score, value["extra"])


def _answer(value: dict[str, Any]) -> Answer:
    prompt = tuple((tuple(token_ids), name) for token_ids, name in value["prompt"])
    return Answer(**{**value, "token_ids": tuple(value["token_ids"]), "prompt": prompt})


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
