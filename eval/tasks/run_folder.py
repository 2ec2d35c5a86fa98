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
from kvcomm.lab.files import CONFIG_BYTES, BadContent, locked, parse_json, read_bytes, replacing

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
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        with locked(folder):  # of two that begin at once the second one finds the settings of the first
            _write(folder / "settings.json", _agreed(folder, _read(folder / "settings.json"), settings))
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
        _write(self.folder / "held.json", held)

    def held_bytes(self) -> dict[str, int]:
        """What estimators hold, as far as it is known."""
        return _read(self.folder / "held.json") or {}

    def add_minutes(self, minutes: float) -> float:
        """Add to what the run has taken so far, pauses between its parts left out; returns the sum."""
        file = self.folder / "minutes.json"
        with locked(self.folder):
            before = (_read(file) or {}).get("minutes", 0.0)
            if not isinstance(before, int | float):
                raise InvalidRequest(f"{file} is damaged ({before!r} are no minutes); give another --out")
            _write(file, {"minutes": minutes + before})
        return float(minutes + before)


def _agreed(folder: Path, before: dict[str, Any] | None, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a run, if they are those that were there before, if there were any."""
    if before is None:
        return settings
    if None in (before.get(TRAIN), settings.get(TRAIN)):  # nothing was learned, or is now
        settings = {**settings, TRAIN: before.get(TRAIN) or settings.get(TRAIN)}
        before[TRAIN] = settings[TRAIN]
    for name in sorted((settings.keys() | before.keys()) - NOT_COMPARED):
        now = json.loads(json.dumps(settings.get(name)))
        if before.get(name) != now:
            raise InvalidRequest(
                f"{folder} holds a run with {name} {before.get(name)!r}, not {now!r}; give another --out"
            )
    return settings


def _write(file: Path, value: Mapping[str, Any]) -> None:
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(dict(value), indent=2) + "\n")


def _read(file: Path) -> dict[str, Any] | None:
    """An object; None: there is no file."""
    try:
        found = parse_json(read_bytes(file, max_bytes=CONFIG_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror or error}") from error
    except BadContent as error:
        raise InvalidRequest(f"{file} is damaged ({error}); give another --out") from error
    if not isinstance(found, dict):
        raise InvalidRequest(f"{file} is damaged (it holds no object); give another --out")
    return found
