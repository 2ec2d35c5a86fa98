"""How long cached pages live, and how long they lie unused: histograms in seconds that count pages.

Sums over all namespaces, so they are the operator's to see. The tree counts, who reads them only reads. Pages are
counted as often as it happens to them: a page that is found ten times has ten gaps.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

BOUNDS_S = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0)
"""Upper bounds of the buckets; one more takes what is above."""


@dataclass(eq=False)
class Histogram:
    """Pages by seconds.

    Attributes:
        counts: pages up to each of `BOUNDS_S`, above the bound before; the last one is for what is above all.
        sum_s: seconds, summed over the pages.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    sum_s: float = 0.0

    def add(self, seconds: float, num_pages: int) -> None:
        """Count pages."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += num_pages
        self.sum_s += seconds * num_pages


@dataclass(frozen=True)
class PageAges:
    """What the tree has counted so far.

    Attributes:
        lifetime: of pages that the tree has dropped, since their tokens came in.
        idle: of those, since their last use.
        reuse_gap: of pages that were found, since the use before.
    """

    lifetime: Histogram = field(default_factory=Histogram)
    idle: Histogram = field(default_factory=Histogram)
    reuse_gap: Histogram = field(default_factory=Histogram)
