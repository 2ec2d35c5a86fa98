"""Documents as a retriever hands them on: passages of question sets, the best match first."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

_WORD = re.compile(r"\w+")
K1, B = 1.2, 0.75
"""How soon further occurrences of a word stop to count, and how much long passages are held against."""


class Passages:
    """Passages that are ranked by Okapi BM25 (Robertson and Zaragoza 2009, Eq. 3.15, without query weights)."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)
        self._counts = [Counter(_words(text)) for text in self.texts]
        lengths = [sum(counts.values()) for counts in self._counts]
        mean = sum(lengths) / max(1, len(lengths)) or 1.0
        self._norms = [K1 * (1 - B + B * length / mean) for length in lengths]
        containing = Counter(word for counts in self._counts for word in counts)
        self._weights = {
            word: math.log(1 + (len(self.texts) - count + 0.5) / (count + 0.5)) for word, count in containing.items()
        }

    def best(self, query: str, count: int) -> list[str]:
        """The passages that match best, in order; among equals the earlier one."""
        words = sorted(set(_words(query)))
        scores = [
            sum(self._weights.get(word, 0.0) * counts[word] * (K1 + 1) / (counts[word] + norm) for word in words)
            for counts, norm in zip(self._counts, self._norms, strict=True)
        ]
        ranked = sorted(range(len(scores)), key=lambda index: -scores[index])
        return [self.texts[index] for index in ranked[:count]]


def passages_of(rows: Sequence[dict[str, Any]], count: int) -> list[str]:
    """The first passages that questions need, each once; where rows do not say which those are, all of theirs."""
    found: dict[str, None] = {}
    for row in rows:
        needed = [each for each in row["ctxs"] if each.get("supporting")] or row["ctxs"]
        for each in needed:
            title = str(each.get("title") or "")
            found.setdefault(f"{title}: {each['text']}" if title else str(each["text"]))
    return list(found)[:count]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
