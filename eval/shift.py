"""Text of another kind on banks of this one: a team really runs on it, and nothing may be approximated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from eval.command import note
from eval.data_files import rows_of
from eval.figures import Figure
from kvcomm import Engine, ReusePolicy
from kvcomm.agents import load_team
from kvcomm.errors import InvalidRequest
from kvcomm.lab.moving import CORRECTED, Reason
from kvcomm.lab.teams import run_all

MAX_CHARACTERS = 1200
"""Of each text; documents are longer."""
FIELDS = ("prompt", "text", "question")
"""Where files have the text, the first one that is there."""
POLICY = ReusePolicy(max_divergence=1.0, confidence=0.95, basis="own", rungs=CORRECTED, learn=False, audit=0.0)
"""So loose that only the distance of the text stands between a calibrated reader and approximation."""


def shift_texts(files: Sequence[Path], count: int) -> list[str]:
    """The first `count` texts of each .jsonl or .jsonl.gz file.

    Raises:
        ValueError: a line without any of the fields.
    """
    return [text for file in files for text in _texts(file)[:count]]


def shift_figures(engine: Engine, team: str, texts: Sequence[str]) -> list[Figure]:
    """Let the team read the texts on an engine whose readers are calibrated."""
    chosen = load_team(team)
    results = run_all(
        chosen.group(engine, policy=POLICY, read_along=False), [{"question": text} for text in texts], chosen, note
    )
    engine.cache.clear()
    usages = [result[name].usage for result in results for name in list(result)[1:]]
    num_requests = len(usages)
    num_approximated = sum(usage.aligned_tokens > 0 for usage in usages)
    reasons = Counter(reason for usage in usages for reason in usage.reasons)
    refused = reasons[Reason.OUT_OF_DISTRIBUTION.value]
    return [
        Figure("shift_approximated", num_approximated, "requests", goal="0"),
        Figure("shift_out_of_distribution", refused / max(1, num_requests), "share", goal="1"),
        Figure("shift_requests", num_requests, "requests"),
        *(Figure(f"shift reason {name}", count / num_requests, "share") for name, count in reasons.most_common()),
    ]


def _texts(file: Path) -> list[str]:
    found = rows_of(file, lambda row: next((row[field] for field in FIELDS if field in row), None), "an object")
    if None in found:
        raise InvalidRequest(f"{file}: line {found.index(None) + 1} has none of the fields {', '.join(FIELDS)}")
    return [str(text)[:MAX_CHARACTERS] for text in found]
