"""What a run found: deviations by kind, and counts of what was compared."""

from __future__ import annotations

import threading
from collections import Counter
from enum import StrEnum
from typing import NamedTuple


class Harm(StrEnum):
    """What a finding counts as."""

    WRONG = "wrong"
    LEAKED = "leaked"
    LOST = "engines_lost"


class Finding(NamedTuple):
    """One deviation.

    Attributes:
        what: its kind in a few words, the same for all of one kind.
        detail: everything needed to understand this one.
        amount: pages for leaks, else 1.
    """

    harm: Harm
    what: str
    detail: str
    amount: int = 1


class Findings:
    """Collected from all threads of a run.

    Attributes:
        counts: of what was done and compared, by name.
    """

    def __init__(self) -> None:
        self.all: list[Finding] = []
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, harm: Harm, what: str, detail: str, amount: int = 1) -> None:
        """Note a deviation."""
        with self._lock:
            self.all.append(Finding(harm, what, detail, amount))

    def wrong(self, what: str, detail: str) -> None:
        """Note an answer, or an error, that is not what it should be."""
        self.add(Harm.WRONG, what, detail)

    def count(self, name: str, number: int = 1) -> None:
        """Count something that was done."""
        with self._lock:
            self.counts[name] += number

    def total(self, harm: Harm) -> int:
        """Sum over the findings of one harm."""
        return sum(finding.amount for finding in self.all if finding.harm is harm)

    def by_kind(self) -> Counter[tuple[Harm, str]]:
        """How often each kind was found."""
        return Counter((finding.harm, finding.what) for finding in self.all)
