"""The base of what files and stored objects hold, checked as it is read."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictRecord(BaseModel):
    """A record of exact types and no unknown fields, which nobody changes: what does not fit is damaged or foreign."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
