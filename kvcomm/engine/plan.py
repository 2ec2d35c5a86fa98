"""The plan of a request: which spans of its prompt come from the cache, which are computed, and why.

Only exact reuse exists here. Spans cover the prompt without gaps, in order.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


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


class Span(NamedTuple):
    """`[start, end)` of a prompt. `reason` is None for reused spans."""

    kind: SpanKind
    start: int
    end: int
    reason: Reason | None = None


@dataclass(frozen=True)
class Plan:
    """The spans of one prompt."""

    spans: tuple[Span, ...] = ()

    def num_tokens(self, kind: SpanKind) -> int:
        """Tokens in spans of a kind."""
        return sum(span.end - span.start for span in self.spans if span.kind is kind)

    @property
    def reasons(self) -> dict[str, int]:
        """Computed tokens by reason."""
        tokens: Counter[str] = Counter()
        for span in self.spans:
            if span.reason is not None:
                tokens[span.reason.value] += span.end - span.start
        return dict(tokens)


def exact_plan(num_reused: int, num_tokens: int, reason: Reason) -> Plan:
    """Reuse the first `num_reused` tokens of a prompt and compute the rest for one reason."""
    spans = []
    if num_reused:
        spans.append(Span(SpanKind.EXACT, 0, num_reused))
    if num_reused < num_tokens:
        spans.append(Span(SpanKind.COMPUTE, num_reused, num_tokens, reason))
    return Plan(tuple(spans))
