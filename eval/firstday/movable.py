"""Which tokens of a prompt could have been moved, told from its spans and from what has been read before.

Movable is text of named segments behind the exact prefix that was known from another context when the request was
planned. Of that the moved tokens count as saved. What a rung or a check computed after all, and what was computed
because it may not be moved, counts as not saved. Text that nobody had read before is not movable, nor is template text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvcomm import Segment
from kvcomm.lab.moving import Reason, Span, SpanKind

NO_SOURCE = frozenset({Reason.NO_SOURCE, Reason.LAST_TOKEN, Reason.IMMOVABLE})
"""Reasons by which text is computed that could not have been moved, also if it was known."""

RECOMPUTED = frozenset({Reason.RUNG, Reason.ESCALATED})
"""Reasons by which moved text is computed after all, in a prompt of which some stays moved."""

TokenIds = tuple[int, ...]


class Movable(NamedTuple):
    """Tokens of one prompt: those that could have been moved, and those of them that were."""

    num_movable: int
    num_moved: int


def movable_of(prompt: Sequence[Segment], spans: Iterable[Span], known: frozenset[TokenIds]) -> Movable:
    """Count.

    Args:
        spans: of the prompt, in order and without gaps, as usage reports them.
        known: texts that somebody had read or written when the request was made. Of what is computed only these count,
            and what was moved first: an engine may give one reason for a whole prompt, some texts of which are new, and
            for a text that the exact prefix reaches into it gives that of the template.
    """
    num_movable = num_moved = 0
    spans = list(spans)
    moves = any(span.kind is SpanKind.ALIGNED for span in spans)
    start = 0
    for segment in prompt:
        end = start + len(segment.token_ids)
        if segment.name is not None:
            for span in spans:
                num_tokens = min(end, span.end) - max(start, span.start)
                if num_tokens <= 0:
                    continue
                is_moved = span.kind is SpanKind.ALIGNED
                is_had = segment.token_ids in known or (moves and span.reason in RECOMPUTED)
                is_computed = span.kind is SpanKind.COMPUTE and span.reason not in NO_SOURCE
                num_moved += num_tokens * is_moved
                num_movable += num_tokens * (is_moved or (is_computed and is_had))
        start = end
    return Movable(num_movable, num_moved)
