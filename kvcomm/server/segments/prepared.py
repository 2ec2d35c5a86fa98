"""A prompt that is ready for the engine, and what its request says about parts of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

from kvcomm.memory.segments import Segment, token_ids_of
from kvcomm.server.followed import FollowedAnswer


class Lifetime(NamedTuple):
    """The first `num_tokens` of a prompt should stay cached for `ttl_s` at least, unless their pages are needed.

    Attributes:
        num_follows: answers that are followed among them, whose tokens come on top.
    """

    num_tokens: int
    ttl_s: float
    num_follows: int = 0


class Follow(NamedTuple):
    """An answer in progress that stands in a prompt, in its segment number `at`, which has no tokens."""

    at: int
    name: str
    source: FollowedAnswer


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
    """Segments for the engine; `placed`: the client's own ones among them, in order.

    Attributes:
        follows: answers in progress among the segments, in order; tokens and places are those without them.
    """

    segments: tuple[Segment, ...]
    lifetimes: tuple[Lifetime, ...] = ()
    placed: tuple[PlacedSegment, ...] = ()
    follows: tuple[Follow, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return sum(len(segment.token_ids) for segment in self.segments)

    @property
    def max_tokens(self) -> int:
        """Tokens that it may have when the answers that it follows have ended."""
        return self.num_tokens + sum(follow.source.max_tokens for follow in self.follows)

    def parts(self) -> Iterator[tuple[Segment, ...] | Follow]:
        """What stands between followed answers, and those, in order."""
        at = 0
        for follow in self.follows:
            if self.segments[at : follow.at]:
                yield self.segments[at : follow.at]
            yield follow
            at = follow.at + 1
        if self.segments[at:]:
            yield self.segments[at:]

    def filled(self) -> Self:
        """The prompt as it has become, once what it follows has ended well; places are not kept."""
        if not self.follows:
            return self
        answers = [follow.source.token_ids or () for follow in self.follows]
        segments = list(self.segments)
        for follow, ids in zip(self.follows, answers, strict=True):
            segments[follow.at] = Segment(ids, follow.name)
        lifetimes = tuple(
            each._replace(num_tokens=each.num_tokens + sum(map(len, answers[: each.num_follows])), num_follows=0)
            for each in self.lifetimes
        )
        return replace(self, segments=tuple(segments), lifetimes=lifetimes, placed=(), follows=())

    @property
    def token_ids(self) -> list[int]:
        """All its token ids."""
        return token_ids_of(self.segments)

    def holding(self, placed: Sequence[PlacedSegment], start: int) -> Self:
        """The same prompt, with more of the client's segments, whose positions are counted from `start`."""
        moved = (each._replace(start=start + each.start, end=start + each.end) for each in placed)
        return replace(self, placed=(*self.placed, *moved))

    def living(self, ttl_s: float | None) -> Self:
        """The same prompt, all of which should stay cached for `ttl_s`; None: as long as the engine says."""
        if ttl_s is None:
            return self
        return replace(self, lifetimes=(*self.lifetimes, Lifetime(self.num_tokens, ttl_s, len(self.follows))))


def num_cached_of(placed: Sequence[PlacedSegment], num_cached: int) -> list[int]:
    """How many of the first `num_cached` tokens of a prompt belong to each segment."""
    return [max(0, min(each.end, num_cached) - each.start) for each in placed]
