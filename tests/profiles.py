"""A small tuned profile, made by hand."""

from __future__ import annotations

from pathlib import Path

from kvcomm.agents.tuning.profile import (
    AgentTable,
    BoundTable,
    DataTable,
    ModelTable,
    PointTable,
    SettingsTable,
    TeamTable,
    TuningProfile,
    ValidityTable,
    VerificationTable,
    write_pairs,
    write_profile,
)
from kvcomm.align.calibration import Measured, Pair, Sources
from kvcomm.align.ladder import CORRECTED, TURNED
from kvcomm.align.levels import Knowledge
from kvcomm.align.readers import Reader

READER = Reader("ab" * 32, ("question",), ("cd" * 32,))
VERIFIED = VerificationTable(
    requests=4, accepted=4, violations=0, share=0.0, low=0.0, high=0.5, limit=0.3, aligned=1.0, holds=True
)


def save_profile(file: Path) -> TuningProfile:
    """Write a profile and its pairs, one reader's, with and without anchors."""
    rungs = [*TURNED, *CORRECTED]
    pair = Pair({rung: Measured(0.25, 0.5 if rung.share else None) for rung in rungs}, {}, Sources(1, 0, 0, 9))
    profile = TuningProfile(
        format=2,
        model=ModelTable(name="tiny", namespace="n"),
        team=TeamTable(name="two", digest="d"),
        bound=BoundTable(max_divergence=0.05, confidence=0.9, basis="pool"),
        settings=SettingsTable(neighbors=8, alpha=(1.0,), sketch_groups=3, sketch_layers=5, anchor_bytes=1024),
        ladders={"token": (0.3, 0.0), "rotate": (0.5, 0.3)},
        verification={"token": VERIFIED, "rotate": VERIFIED},
        agents={"second": AgentTable(reader=READER.digest, num_pairs=2)},
        validity=ValidityTable(holds_for="tests", made="2026-01-01T00:00:00+00:00", budget_s=1.0, versions={"a": "1"}),
        data=DataTable(file="f", rule="r", anchors=("a",), tuning=("b",), calibration=("c",), verification=("d",)),
        pairs=write_pairs(file, "n", Knowledge(((READER, (pair, pair)),))),
        banks={"x.safetensors": "0" * 64},
        pareto=(PointTable(setting="rotate", computed=0.0, divergence=0.1, agreement=0.9, on_front=True),),
    )
    write_profile(profile, file)
    return profile
