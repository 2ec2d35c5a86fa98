"""From the engine's usage to the wire's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from kvcomm.align.standings import LEVELS
from kvcomm.engine.results import Usage
from kvcomm.reuse.plan import BoundInForce, Span, SpanKind
from kvcomm.server.schemas.usage import BoundObject, PlanSpan, PromptTokensDetails, Timings, UsageObject

SOURCES: dict[SpanKind, Literal["exact", "aligned", "computed"]] = {
    SpanKind.EXACT: "exact",
    SpanKind.ALIGNED: "aligned",
    SpanKind.COMPUTE: "computed",
}


def usage_of(usages: Sequence[Usage], *, cache_breakpoints: int = 0) -> UsageObject:
    """The usage of a request that took one or more engine requests: sums, and the slowest one's times."""
    prompt = sum(usage.prompt_tokens for usage in usages)
    generated = sum(usage.generated_tokens for usage in usages)
    exact = sum(usage.exact_tokens for usage in usages)
    reasons: Counter[str] = Counter()
    for usage in usages:
        reasons.update(usage.reasons)
    moved = [usage.approximation for usage in usages if usage.approximation is not None]
    rung = max(moved, key=lambda report: report.share, default=None)
    return UsageObject(
        prompt_tokens=prompt,
        completion_tokens=generated,
        total_tokens=prompt + generated,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=exact),
        input_tokens=prompt,
        output_tokens=generated,
        cached_prefix_tokens=exact,
        tier_tokens=sum(usage.tier_tokens for usage in usages),
        aligned_tokens=sum(usage.aligned_tokens for usage in usages),
        computed_tokens=sum(usage.computed_tokens for usage in usages),
        read_along_tokens=sum(usage.read_along_tokens for usage in usages),
        miss_reasons=dict(reasons),
        rung=None if rung is None else rung.share,
        rung_name=None if rung is None else rung.rung,
        healed_after=max((usage.healed_after for usage in usages if usage.healed_after is not None), default=None),
        not_healed=next((usage.not_healed.value for usage in usages if usage.not_healed is not None), None),
        bound=_bound([usage.bound for usage in usages if usage.bound is not None]),
        cache_breakpoints=cache_breakpoints,
        timings=Timings(
            queue_s=max(usage.queue_s for usage in usages),
            ttft_s=max(usage.ttft_s for usage in usages),
            total_s=max(usage.total_s for usage in usages),
        ),
    )


def _bound(bounds: Sequence[BoundInForce]) -> BoundObject | None:
    """The one of several bounds that rests on least, by level and then by pairs."""
    if not bounds:
        return None
    moved = [bound for bound in bounds if bound.level is not None]
    least = min(moved, key=lambda each: (-LEVELS.index(each.level), each.num_pairs), default=bounds[0])
    return BoundObject(
        max_divergence=least.max_divergence,
        confidence=least.confidence,
        level=None if least.level is None else least.level.value,
        num_pairs=least.num_pairs,
    )


def plan_of(spans: Iterable[Span]) -> list[PlanSpan]:
    """The plan of one engine request, from its spans."""
    return [_span(span) for span in spans]


def _span(span: Span) -> PlanSpan:
    reason = None if span.reason is None else span.reason.value
    return PlanSpan(start=span.start, end=span.end, source=SOURCES[span.kind], reason=reason)
