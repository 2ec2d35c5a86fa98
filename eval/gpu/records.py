"""What a part has found so far, line by line in a file, so that it is not lost where the part is stopped or crashes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.figures import Figure
from kvcomm.lab.timings import Samples


class Clock:
    """How much of a part's time is left. A part looks at it between measurements."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds; less than 0 where it is over."""
        return self._end - time.monotonic()


class Recorder:
    """Appends to the file of a part, one JSON object a line."""

    def __init__(self, file: Path, clock: Clock) -> None:
        self._file = file
        self._clock = clock

    @property
    def left_s(self) -> float:
        """Seconds of the part's time that are left."""
        return self._clock.left_s

    @property
    def is_over(self) -> bool:
        """Whether nothing more should be begun."""
        return self._clock.left_s <= 0

    def figure(self, name: str, value: float, unit: str, *, goal: str = "") -> None:
        """One number."""
        self._write(figure={"id": name, "value": value, "unit": unit, "spread": None, "goal": goal})

    def samples(self, name: str, values: Sequence[float], unit: str, *, goal: str = "") -> None:
        """Repeated measurements of one quantity: median and quartiles as a figure, and all of them."""
        measured = Samples(tuple(values))
        spread = list(measured.quartiles)
        self._write(figure={"id": name, "value": measured.median, "unit": unit, "spread": spread, "goal": goal})
        self._write(sample={name: list(values)})

    def row(self, row: Sequence[float | str]) -> None:
        """One row of the table of first tokens."""
        self._write(row=list(row))

    def setting(self, **settings: Any) -> None:
        """How the part was run."""
        self._write(setting=settings)

    def skipped(self, why: str) -> None:
        """The part, or something in it, is not measured here."""
        self._write(skipped=why)

    def cut(self, before: str) -> None:
        """The time was over before that."""
        self._write(cut=f"its time was over before {before}")

    def failed(self, why: str) -> None:
        """Something raised; the rest goes on."""
        self._write(failed=why)

    def _write(self, **line: Any) -> None:
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


@dataclass
class Found:
    """What a part's file holds."""

    figures: list[Figure] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)
    rows: list[tuple[float | str, ...]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Found:
        """All whole lines; there are none where the part could not even begin."""
        found = cls()
        if not file.exists():
            return found
        *lines, _ = file.read_text(encoding="utf-8").split("\n")  # what stands behind the last line's end is torn
        for line in lines:
            ((kind, value),) = json.loads(line).items()
            if kind == "figure":
                spread = value.pop("spread")
                found.figures.append(Figure(**value, spread=spread and tuple(spread)))
            elif kind == "sample":
                found.samples |= value
            elif kind == "row":
                found.rows.append(tuple(value))
            elif kind == "setting":
                found.settings |= value
            else:
                getattr(found, kind).append(value)
        return found

    @property
    def state(self) -> str:
        """In one word."""
        if self.failed:
            return "failed"
        if self.cut:
            return "cut"
        return "skipped" if self.skipped and not self.figures else "done"

    def to_json(self) -> dict[str, Any]:
        """State, what was left out or went wrong, and settings."""
        told = {"skipped": self.skipped, "cut": self.cut, "failed": self.failed}
        return {"state": self.state, **{name: lines for name, lines in told.items() if lines}, **self.settings}
