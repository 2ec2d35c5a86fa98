"""The plan of a request: which spans of its prompt come from the cache, which are moved, which are computed, and why.

Spans cover the prompt without gaps, in order. What is told about a plan, before and after it was carried out, stands
here, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from kvcomm.align.standings import Level
from kvcomm.plain import Plain


class SpanKind(StrEnum):
    """How the KV of a span comes about."""

    EXACT = "exact"
    ALIGNED = "aligned"
    COMPUTE = "compute"


class Reason(StrEnum):
    """Why a span is computed."""

    NEW = "new"
    """No cached prompt continues like this one."""
    EVICTED = "evicted"
    """It was cached, but its pages were needed."""
    EXPIRED = "expired"
    """It was cached and outlived its TTL."""
    QUOTA = "quota"
    """The tenant's quota left no room to keep it."""
    LAST_TOKEN = "last_token"
    """Everything is cached, but the last token's logits are needed to go on."""
    CACHE_OFF = "cache_off"
    """Reuse is switched off."""

    GLUE = "glue"
    """Template text behind the first moved segment."""
    RUNG = "rung"
    """Moved text that this rung of the ladder recomputes."""
    NO_SOURCE = "no_source"
    """This text has not been seen in another context, or is not kept any more."""
    DISPLACED = "displaced"
    """It stands first here, and is known only from where it stood behind others: moved, it would be read worst."""
    COMES_BACK = "comes_back"
    """It was moved to this very place before: computed now, it is an exact prefix from now on."""
    IMMOVABLE = "immovable"
    """This model's keys cannot be moved to other positions."""
    NO_ANCHORS = "no_anchors"
    """The only rungs asked for correct by anchors, and there are too few between these two contexts."""
    UNCALIBRATED = "uncalibrated"
    """Too few exact examples yet, at the levels that the caller accepts, to promise what is asked for."""
    BOUND = "bound"
    """There are examples enough, and no rung keeps the caller's bound."""
    BREAKER = "breaker"
    """Audits found more violations than the bound allows."""
    OUT_OF_DISTRIBUTION = "out_of_distribution"
    """This text is too far from what the bound was calibrated on."""
    SOURCE_RISK = "source_risk"
    """The source is approximate itself, and may be further off than the caller accepts."""
    COST = "cost"
    """Moving would take longer than computing."""
    ESCALATED = "escalated"
    """Recomputed tokens were further from their estimates than calibration allows."""
    NO_ROOM = "no_room"
    """The pool cannot hold the prompt beside what was found of it."""
    FAILED = "failed"
    """Moving it failed; the engine's log says how."""

    READ_ALONG = "read_along"
    """Computed before the prompt was complete, while others decoded or nobody did."""
    TOO_LATE = "too_late"
    """An answer was followed, and this of it was written too late to be read along."""
    NO_SPARE = "no_spare"
    """An answer was followed, and answers in progress left no time to read this of it along."""

    TIER_SLOW = "tier_slow"
    """The shared tier has it, and computing it was quicker."""
    TIER_CORRUPT = "tier_corrupt"
    """The shared tier has it, but altered, or not as its name says."""
    TIER_FAILED = "tier_failed"
    """The shared tier had it, and lost it or failed to give it."""

    @property
    def words(self) -> str:
        """Why, in a few words behind "computed because"."""
        return WORDS[self]


WORDS = {
    Reason.NEW: "not seen before",
    Reason.EVICTED: "dropped from the cache to make room",
    Reason.EXPIRED: "too long in the cache",
    Reason.QUOTA: "no room in the tenant's share of the cache",
    Reason.LAST_TOKEN: "last token, needed to go on",
    Reason.CACHE_OFF: "reuse is off",
    Reason.GLUE: "template text between moved texts",
    Reason.RUNG: "moved text that is computed for the bound's sake",
    Reason.NO_SOURCE: "not known from another prompt",
    Reason.DISPLACED: "stands first here, known only from behind other text",
    Reason.COMES_BACK: "moved to this place before, computed so that it is exact from now on",
    Reason.IMMOVABLE: "this model's keys cannot be moved",
    Reason.NO_ANCHORS: "too few measured offsets to correct it",
    Reason.UNCALIBRATED: "too few measured prompts to promise the bound",
    Reason.BOUND: "measured prompts broke the bound",
    Reason.BREAKER: "audits found too many answers above the bound",
    Reason.OUT_OF_DISTRIBUTION: "unlike the text that was measured",
    Reason.SOURCE_RISK: "its source is too far off itself",
    Reason.COST: "moving it would take longer",
    Reason.ESCALATED: "further off than expected, as a check found",
    Reason.NO_ROOM: "no room in the pool",
    Reason.FAILED: "moving it failed, see the log",
    Reason.READ_ALONG: "before the prompt was complete",
    Reason.TOO_LATE: "written too late to be read along",
    Reason.NO_SPARE: "no time was left to read it along",
    Reason.TIER_SLOW: "computing was quicker than the shared tier",
    Reason.TIER_CORRUPT: "damaged in the shared tier",
    Reason.TIER_FAILED: "the shared tier failed",
}


class Span(NamedTuple):
    """`[start, end)` of a prompt. `reason` is None for reused spans."""

    kind: SpanKind
    start: int
    end: int
    reason: Reason | None = None


@dataclass(frozen=True)
class Plan(Plain):
    """The spans of one prompt."""

    spans: tuple[Span, ...] = ()

    @property
    def stretches(self) -> tuple[tuple[int, int], ...]:
        """`[start, end)` of what is computed, in order, adjacent spans as one."""
        found: list[tuple[int, int]] = []
        for span in self.spans:
            if span.kind is not SpanKind.COMPUTE:
                continue
            if found and found[-1][1] == span.start:
                found[-1] = (found[-1][0], span.end)
            else:
                found.append((span.start, span.end))
        return tuple(found)

    @property
    def num_exact_prefix(self) -> int:
        """Leading tokens that come from the cache exactly."""
        return self.spans[0].end if self.spans and self.spans[0].kind is SpanKind.EXACT else 0

    def num_tokens(self, kind: SpanKind) -> int:
        """Tokens in spans of a kind."""
        return sum(span.end - span.start for span in self.spans if span.kind is kind)

    def exact_up_to(self, position: int | None) -> Plan:
        """The same plan where reused KV from `position` on is known not to be a cold run's; None: all of it is."""
        if position is None:
            return self
        spans: list[Span] = []
        for span in self.spans:
            if span.kind is not SpanKind.EXACT or span.end <= position:
                spans.append(span)
                continue
            if span.start < position:
                spans.append(span._replace(end=position))
            spans.append(span._replace(kind=SpanKind.ALIGNED, start=max(span.start, position)))
        return Plan(tuple(spans))

    def reused(self, start: int, end: int) -> Plan:
        """The same plan where `[start, end)`, which was to be computed, is reused exactly after all."""
        spans: list[Span] = []
        for span in self.spans:
            first, last = max(start, span.start), min(end, span.end)
            if first >= last:
                spans.append(span)
                continue
            pieces = [span._replace(end=first), Span(SpanKind.EXACT, first, last), span._replace(start=last)]
            spans += [piece for piece in pieces if piece.start < piece.end]
        return Plan(tuple(spans))

    def explained(self, start: int, end: int, known: Reason, reason: Reason) -> Plan:
        """The same plan where what of `[start, end)` is computed for a known reason is told with another one."""
        spans: list[Span] = []
        for span in self.spans:
            first, last = max(start, span.start), min(end, span.end)
            if span.reason is not known or first >= last:
                spans.append(span)
                continue
            within = Span(span.kind, first, last, reason)
            pieces = [span._replace(end=first), within, span._replace(start=last)]
            spans += [piece for piece in pieces if piece.start < piece.end]
        return Plan(tuple(spans))

    @property
    def reasons(self) -> dict[str, int]:
        """Computed tokens by reason."""
        tokens: Counter[str] = Counter()
        for span in self.spans:
            if span.reason is not None:
                tokens[span.reason.value] += span.end - span.start
        return dict(tokens)


class Part(NamedTuple):
    """What is to be said about `[start, end)` of a prompt behind its exact prefix: moved, or computed for a reason."""

    start: int
    end: int
    reason: Reason | None


def plan_of(num_exact: int, parts: Iterable[Part]) -> Plan:
    """The plan of an exact prefix and the parts behind it, which must follow each other; neighbors are joined."""
    spans = [Span(SpanKind.EXACT, 0, num_exact)] if num_exact else []
    for part in parts:
        kind = SpanKind.ALIGNED if part.reason is None else SpanKind.COMPUTE
        last = spans[-1] if spans else None
        assert part.start == (last.end if last else 0), (last, part)
        if last is not None and (last.kind, last.reason) == (kind, part.reason):
            spans[-1] = last._replace(end=part.end)
        elif part.start < part.end:
            spans.append(Span(kind, part.start, part.end, part.reason))
    return Plan(tuple(spans))


def exact_plan(num_reused: int, num_tokens: int, reason: Reason) -> Plan:
    """Reuse the first `num_reused` tokens of a prompt and compute the rest for one reason."""
    spans = []
    if num_reused:
        spans.append(Span(SpanKind.EXACT, 0, num_reused))
    if num_reused < num_tokens:
        spans.append(Span(SpanKind.COMPUTE, num_reused, num_tokens, reason))
    return Plan(tuple(spans))


class BoundInForce(NamedTuple):
    """The bound that a request was served under.

    Attributes:
        max_divergence: epsilon, nats; KL(exact || reused) averaged over the next 32 tokens.
        delta: the probability with which it may be broken among accepted requests.
        level: whose pairs it rests on; None: nothing was moved, so it holds whatever they say.
        num_pairs: how many those are.
    """

    max_divergence: float
    delta: float
    level: Level | None = None
    num_pairs: int = 0

    @property
    def confidence(self) -> float:
        """1 - delta."""
        return 1 - self.delta


class ApproximationReport(NamedTuple):
    """How a request reused moved KV.

    Attributes:
        reader: digest of who read.
        rung: the rung, in words.
        share: of the moved tokens that the rung recomputed at most.
        predicted: nats; the divergence that calibration expects at most, the sources' risk included.
        distance: of the text from what is known.
        residual: of the recomputed tokens' estimates; None where none was recomputed.
    """

    reader: str
    rung: str
    share: float
    predicted: float
    distance: float
    residual: float | None


@dataclass(frozen=True)
class Explanation(Plain):
    """The plan that a request would get now, and what it would take.

    Attributes:
        plan: its spans and reasons as they would be at admission. Moved text is given as such whole: which of its
            tokens the rung recomputes, and whether checks make it exact after all, only the passes themselves tell.
        share: of the moved tokens that would be recomputed at most; None: nothing would be moved.
        predicted: nats of divergence that calibration expects at most; None: nothing would be moved.
        prefill_s: predicted seconds of its passes up to the first token, on this machine when it does nothing else.
        cold_s: the same with nothing cached. Both None until the machine has been measured, which the first question
            asks for.
    """

    plan: Plan
    share: float | None = None
    predicted: float | None = None
    prefill_s: float | None = None
    cold_s: float | None = None

    def __repr__(self) -> str:
        tokens = {kind: self.plan.num_tokens(kind) for kind in SpanKind}
        share = "" if self.share is None else f", share {self.share:g}"
        times = "not measured yet"
        if self.prefill_s is not None and self.cold_s is not None:
            times = f"{self.prefill_s:.3g} s instead of {self.cold_s:.3g} s"
        return (
            f"Explanation({tokens[SpanKind.EXACT]} exact + {tokens[SpanKind.ALIGNED]} aligned + "
            f"{tokens[SpanKind.COMPUTE]} computed{share}, {times})"
        )
