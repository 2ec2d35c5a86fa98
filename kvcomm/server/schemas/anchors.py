"""`GET /v1/anchors/status`: what is known of moving the caller's text, and what is missing, in numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvcomm.server.schemas.common import LevelName, ResponseModel
from kvcomm.server.schemas.stats import WANTED_PAIRS, ReaderStanding


class PairCount(ResponseModel):
    """Pairs of one level, along the rungs of one estimator."""

    level: LevelName
    estimator: Annotated[str, Field(description="rotate: keys are turned only; token: with anchors.")]
    num_pairs: int
    num_wanted: Annotated[int, Field(description=WANTED_PAIRS)]


class ReaderCounts(ReaderStanding):
    """One reader, and what every level has for it."""

    levels: list[PairCount]


class BankStanding(ResponseModel):
    """Anchors between two contexts of a text."""

    edge: Annotated[str, Field(description="Digest of where text is moved from and to.")]
    slot: str
    source_slot: str
    in_any_context: Annotated[bool, Field(description="For these slots wherever they stand.")]
    num_tokens: int
    num_wanted: Annotated[
        int, Field(description="Anchor tokens at which something changes next: it may be used, or is full.")
    ]


class AnchorStatus(ResponseModel):
    """Readers and banks of the caller, the latest readers and the largest banks first."""

    object: Literal["anchors.status"] = "anchors.status"
    max_divergence: Annotated[float, Field(description="The bound that pairs are counted for.")]
    confidence: float
    shared: Annotated[list[PairCount], Field(description="Levels that belong to no single reader.")]
    readers: list[ReaderCounts]
    banks: list[BankStanding]
