"""What one tenant's requests came to: tokens by source, reasons, times, how they ended, and the latest ones.

Belongs to one tenant and is told to nobody else: Prometheus' counters, which are sums over all tenants, are not read
from here. Bounded: sums, one histogram, one history, the last few requests. Used from the event loop's thread only.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from kvcomm.engine.results import Usage
from kvcomm.server.endings import Refused, reasons_of, refused_of
from kvcomm.server.history import History
from kvcomm.server.logs import Ended

MAX_RECENT = 60
MAX_REFUSED = 40

COUNTED = ("requests", "refused", "prompt_tokens", "reused_tokens", "generated_tokens")
"""What the history counts."""

SOURCES = ("exact", "aligned", "computed", "tier", "read_along")
"""Of prompt tokens; those from the tier are among the exact ones, those read along among the computed ones."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
"""Upper bounds of the buckets of every histogram of times."""


class Finished(NamedTuple):
    """One engine request that ended well, `at_s` on the tally's clock."""

    at_s: float
    usage: Usage


@dataclass(eq=False)
class Tally:
    """Sums over a tenant's engine requests that ended well, and how its HTTP requests ended.

    Attributes:
        clock: seconds, monotonic.
        tokens: of prompts, by source, see `SOURCES`.
        misses: computed tokens of prompts, by reason.
        ttft_counts: requests by time to the first token: up to each of `SECONDS`, then above.
        finish_reasons: HTTP requests by how they ended, see `reasons_of`.
        history: of the sums and of refused requests, over the last minutes.
    """

    clock: Callable[[], float] = time.monotonic
    num_requests: int = 0
    generated_tokens: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)
    ttft_counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    ttft_sum_s: float = 0.0
    recent: deque[Finished] = field(default_factory=lambda: deque(maxlen=MAX_RECENT))
    finish_reasons: Counter[str] = field(default_factory=Counter)
    refused: deque[Refused] = field(default_factory=lambda: deque(maxlen=MAX_REFUSED))
    history: History = field(init=False)

    def __post_init__(self) -> None:
        self.history = History(self.clock)

    def add(self, usage: Usage) -> None:
        """Count a request."""
        self.num_requests += 1
        self.generated_tokens += usage.generated_tokens
        self.tokens.update(sources_of(usage))
        self.misses.update(usage.reasons)
        self.ttft_counts[bisect_left(SECONDS, usage.ttft_s)] += 1
        self.ttft_sum_s += usage.ttft_s
        self.recent.append(Finished(self.clock(), usage))
        self.history.add(
            {
                "requests": 1,
                "prompt_tokens": usage.prompt_tokens,
                "reused_tokens": usage.exact_tokens + usage.aligned_tokens,
                "generated_tokens": usage.generated_tokens,
            }
        )

    def ended(self, ended: Ended) -> None:
        """Count how an HTTP request ended, whatever it asked for."""
        self.finish_reasons.update(reasons_of(ended))
        refused = refused_of(ended, self.clock())
        if refused is not None:
            self.refused.append(refused)
            self.history.add({"refused": 1})


def sources_of(usage: Usage) -> dict[str, int]:
    """Prompt tokens of a request by source."""
    counts = (
        usage.exact_tokens,
        usage.aligned_tokens,
        usage.computed_tokens,
        usage.tier_tokens,
        usage.read_along_tokens,
    )
    return dict(zip(SOURCES, counts, strict=True))
