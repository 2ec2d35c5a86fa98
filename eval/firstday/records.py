"""What is kept of every request, line by line, and of which part of an evaluation it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from eval.firstday.movable import RECOMPUTED
from eval.tasks.records import RecordFile
from kvcomm.lab.bounds import Bound


@dataclass(frozen=True)
class Call:
    """One agent's call within a request.

    Attributes:
        prompt, exact, aligned, computed: tokens, as usage counts them.
        movable, moved: tokens; see `movable`.
        reasons: computed tokens by reason.
        level, num_pairs, rung, predicted: on what grounds text was moved, and how; level None: none was.
        divergence: nats from the exact answer, measured; None: nothing was moved.
        ttft_s, exact_ttft_s: seconds to the first token here, and of the same prompt with exact reuse only.
        methods: nats of published methods at the same computed share.
    """

    agent: str
    prompt: int
    exact: int
    aligned: int
    computed: int
    movable: int
    moved: int
    reasons: Mapping[str, int]
    ttft_s: float
    exact_ttft_s: float
    level: str | None = None
    num_pairs: int = 0
    rung: str | None = None
    predicted: float | None = None
    divergence: float | None = None
    methods: Mapping[str, float] = field(default_factory=dict)

    @property
    def recomputed_share(self) -> float:
        """Of the tokens for which moved KV was written, that were computed after all."""
        recomputed = sum(self.reasons.get(reason.value, 0) for reason in RECOMPUTED)
        return recomputed / max(1, self.aligned + recomputed)


@dataclass(frozen=True)
class Served:
    """One request, as its user sees it.

    Attributes:
        number: from 1 on.
        seconds: from asking to the last answer, learning that came in between included.
        learning_s: of them spent on learning.
        num_pairs: that all readers had after it.
        calls: of the agents, in the order in which they were made.
    """

    number: int
    seconds: float
    learning_s: float
    calls: tuple[Call, ...]
    num_pairs: int = 0

    @property
    def moves(self) -> bool:
        """Whether any text was moved."""
        return any(call.aligned for call in self.calls)


class ServedFile(RecordFile[Served]):
    """The requests of one part."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, _served)


class Part(NamedTuple):
    """One workload on a fresh engine, under one bound, with the model's prior or without."""

    workload: str
    uses_prior: bool
    bound: Bound

    @property
    def label(self) -> str:
        """For people and file names."""
        prior = "prior" if self.uses_prior else "no-prior"
        return f"{self.workload} {prior} {self.bound.max_divergence:g},{self.bound.confidence:g}"

    def file(self, folder: Path, settings: Mapping[str, Any]) -> ServedFile:
        """Where its requests are kept; another file with other settings."""
        digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:12]
        return ServedFile(folder / f"{self.label.replace(' ', '_')}_{digest}.jsonl")


def _served(value: dict[str, Any]) -> Served:
    return Served(**{**value, "calls": tuple(Call(**call) for call in value["calls"])})
