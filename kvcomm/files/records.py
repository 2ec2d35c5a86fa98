"""The base of what files and stored objects hold, checked as it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict


class StrictRecord(BaseModel):
    """A record of exact types and no unknown fields, which nobody changes: what does not fit is damaged or foreign."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def require_once(what: str, values: Iterable[object]) -> None:
    """Raises ValueError where something is listed twice."""
    twice = [value for value, number in Counter(values).items() if number > 1]
    if twice:
        raise ValueError(f"{what} {twice[0]!r} is listed twice")
