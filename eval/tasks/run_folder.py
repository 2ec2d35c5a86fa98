"""The folder of a run: what is kept of it, and whether a later run may go on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from eval.tasks.options import NOT_COMPARED
from eval.tasks.replays import DivergenceFile
from eval.tasks.samples import SampleFile
from eval.tasks.timing import TimesFile
from kvcomm.errors import InvalidRequest

TRAIN = "train_rows"


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run is."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any]) -> Self:
        """The folder, made or taken up again.

        Raises:
            InvalidRequest: it holds a run with other settings; names the first difference.
        """
        file = folder / "settings.json"
        if file.exists():
            before = _read(file)
            if None in (before.get(TRAIN), settings.get(TRAIN)):  # nothing was learned, or is now
                settings = {**settings, TRAIN: before.get(TRAIN) or settings.get(TRAIN)}
                before[TRAIN] = settings[TRAIN]
            for name in sorted((settings.keys() | before.keys()) - NOT_COMPARED):
                now = json.loads(json.dumps(settings.get(name)))
                if before.get(name) != now:
                    raise InvalidRequest(
                        f"{folder} holds a run with {name} {before.get(name)!r}, not {now!r}; give another --out"
                    )
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=2) + "\n")
        return cls(folder)

    def samples(self, name: str) -> SampleFile:
        """Of a mode, or "train": of the questions to learn from."""
        return SampleFile(self.folder / "samples" / f"{name}.jsonl")

    @property
    def times(self) -> TimesFile:
        """Of the timed questions."""
        return TimesFile(self.folder / "times.jsonl")

    @property
    def divergences(self) -> DivergenceFile:
        """Of the replayed questions."""
        return DivergenceFile(self.folder / "divergences.jsonl")

    @property
    def anchors(self) -> Path:
        """What was learned about moving text."""
        return self.folder / "anchors"

    def keep_bytes(self, held: Mapping[str, int]) -> None:
        """Write down what estimators hold."""
        (self.folder / "held.json").write_text(json.dumps(dict(held)) + "\n")

    def held_bytes(self) -> dict[str, int]:
        """What estimators hold, as far as it is known."""
        file = self.folder / "held.json"
        return _read(file) if file.exists() else {}

    def add_minutes(self, minutes: float) -> float:
        """Add to what the run has taken so far, pauses between its parts left out; returns the sum."""
        file = self.folder / "minutes.json"
        total = minutes + (_read(file)["minutes"] if file.exists() else 0.0)
        file.write_text(json.dumps({"minutes": total}) + "\n")
        return float(total)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{file} is damaged ({error}); give another --out") from error
    return dict(found)
