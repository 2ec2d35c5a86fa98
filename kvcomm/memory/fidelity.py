"""Fidelity: whether stored KV is what a cold run would have computed."""

from __future__ import annotations

from enum import StrEnum


class Fidelity(StrEnum):
    """A property of every page, node and rendition. Approximate never turns into exact."""

    EXACT = "exact"
    APPROXIMATE = "approximate"
