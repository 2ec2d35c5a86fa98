"""`GET /v1/anchors/status`: what is known of moving the caller's text, and what is missing, in numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvcomm.server.schemas.common import LevelName, ResponseModel
from kvcomm.server.schemas.stats import NEEDED_PAIRS, WORKING_DELTA


class LevelStatusObject(ResponseModel):
    """Pairs of one level, along the rungs of one estimator."""

    level: LevelName
    estimator: Annotated[str, Field(description="rotate: keys are turned only; token: with anchors.")]
    num_pairs: int
    num_needed: Annotated[int, Field(description=NEEDED_PAIRS)]
    num_settled: Annotated[int, Field(description="From which on it decides although other levels have more.")]
    is_barred: Annotated[bool, Field(description="Audits have shown that it does not hold.")]
    working_delta: Annotated[float, Field(description=WORKING_DELTA)]
    num_audits: int
    num_violations: int


class EdgeStatusObject(ResponseModel):
    """Anchors between a source and one of the slots."""

    edge: Annotated[str, Field(description="Digest of where text is moved from and to.")]
    slot: str
    source_slot: str
    num_tokens: Annotated[int, Field(description="Anchor tokens.")]
    num_needed: Annotated[int, Field(description="From which on they are used.")]
    num_enough: Annotated[int, Field(description="From which on none are added.")]


class ReaderStatusObject(ResponseModel):
    """One kind of prompt, told by its template."""

    reader: Annotated[str, Field(description="Digest of the template; empty: of none that has been seen.")]
    slots: list[str]
    level: Annotated[LevelName | None, Field(description="Whose pairs would decide now; null: it would be computed.")]
    rung: Annotated[float | None, Field(description="Share of the moved tokens that would be recomputed at most.")]
    rung_name: str | None
    predicted_divergence: Annotated[float | None, Field(description="Nats, at most.")]
    reason: Annotated[str | None, Field(description="Why it would be computed.")]
    levels: Annotated[list[LevelStatusObject], Field(description="The most specific first.")]
    edges: Annotated[list[EdgeStatusObject], Field(description="That lead to it and have anchors.")]
    num_requests: Annotated[int, Field(description="In which text could have been moved.")]
    num_approximated: Annotated[int, Field(description="In which text was moved within a bound.")]
    num_audits: int
    num_violations: int


class AnchorStatus(ResponseModel):
    """Readers of the caller, the latest first."""

    object: Literal["anchors.status"] = "anchors.status"
    max_divergence: Annotated[float, Field(description="The bound that the rest is about.")]
    confidence: float
    basis: LevelName
    readers: list[ReaderStatusObject]
    newcomer: Annotated[
        ReaderStatusObject, Field(description="A kind of prompt that has never been seen, of requests without a salt.")
    ]
