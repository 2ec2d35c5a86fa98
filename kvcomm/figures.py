"""One measured number, as every benchmark of kvcomm reports it. Needs nothing."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """One line of a result; `spread` holds the quartiles of what was measured repeatedly."""

    id: str
    value: float
    unit: str
    spread: tuple[float, float] | None = None
