"""A prompt that is ready for the engine, and what its request says about parts of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

from kvcomm.memory.segments import Segment


class Lifetime(NamedTuple):
    """The first `num_tokens` of a prompt should stay cached for `ttl_s` at least, unless their pages are needed."""

    num_tokens: int
    ttl_s: float


class PlacedSegment(NamedTuple):
    """A client's segment at positions [start, end) of a prompt.

    Attributes:
        id: the client's.
        digest: of its tokens when it is tokenized alone, in the tenant's namespace.
    """

    id: str
    digest: str
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        """How long it is here."""
        return self.end - self.start


@dataclass(frozen=True)
class PreparedPrompt:
    """Segments for the engine; `placed`: the client's own ones among them, in order."""

    segments: tuple[Segment, ...]
    lifetimes: tuple[Lifetime, ...] = ()
    placed: tuple[PlacedSegment, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return sum(len(segment.token_ids) for segment in self.segments)

    @property
    def token_ids(self) -> list[int]:
        """All its token ids."""
        return [token for segment in self.segments for token in segment.token_ids]

    def holding(self, placed: Sequence[PlacedSegment], start: int) -> Self:
        """The same prompt, with more of the client's segments, whose positions are counted from `start`."""
        moved = (each._replace(start=start + each.start, end=start + each.end) for each in placed)
        return replace(self, placed=(*self.placed, *moved))

    def living(self, ttl_s: float | None) -> Self:
        """The same prompt, all of which should stay cached for `ttl_s`; None: as long as the engine says."""
        if ttl_s is None:
            return self
        return replace(self, lifetimes=(*self.lifetimes, Lifetime(self.num_tokens, ttl_s)))


def num_cached_of(placed: Sequence[PlacedSegment], num_cached: int) -> list[int]:
    """Of the first `num_cached` tokens of a prompt, how many belong to each segment."""
    return [max(0, min(each.end, num_cached) - each.start) for each in placed]
