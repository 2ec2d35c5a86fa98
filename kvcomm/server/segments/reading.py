"""From the segments of a request to the beginning of its prompt.

The server tokenizes and hashes; what a client says about a hash is only ever compared. Control tokens spelled out in a
segment are ordinary text. To the engine a segment is a slot, so that it can be moved behind other prefixes: a dynamic
one is named by its id, a static one by its text too, since static text tells contexts apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvcomm.engine.encoding import TextEncoder
from kvcomm.memory.segments import Prompt, Segment
from kvcomm.server.errors import SOURCE_FAILED, ApiError
from kvcomm.server.followed import FollowedAnswer
from kvcomm.server.schemas.common import seconds
from kvcomm.server.schemas.segments import FollowedSegment, PromptSegment, RegisteredSegment, SegmentInput
from kvcomm.server.segments.joining import Joiner, TextPiece
from kvcomm.server.segments.prepared import Follow, Lifetime, PlacedSegment, PreparedPrompt
from kvcomm.server.segments.registry import SegmentRegistries
from kvcomm.server.text_limit import TextLimit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextSource(Protocol):
    """Who tokenizes: an engine, or less than one."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own."""
        ...

    @property
    def encoder(self) -> TextEncoder:
        """What tokenizes with it."""
        ...

    @property
    def max_context(self) -> int:
        """Tokens of a prompt and its answer."""
        ...

    def read_prompt(self, prompt: Prompt, *, is_start: bool) -> tuple[Segment, ...]:
        """See `PromptReader.read`."""
        ...

    def segment(self, text: str, *, name: str | None = None) -> Segment:
        """See `PromptReader.segment`."""
        ...

    def home(self, tenant: str) -> str:
        """What digests of a tenant's segments are made with."""
        ...


class PromptTail(NamedTuple):
    """What stands behind the segments: text that may be joined with them, then tokens that begin with a boundary.

    Attributes:
        name: of the text; None: static.
        placed: the client's own among `segments`, with positions from their start.
    """

    text: str = ""
    name: str | None = None
    segments: tuple[Segment, ...] = ()
    placed: tuple[PlacedSegment, ...] = ()


class _Read(NamedTuple):
    """A segment of a request, tokenized alone."""

    piece: TextPiece
    id: str
    digest: str
    ttl_s: float | None
    source: FollowedAnswer | None = None  # that is followed


class SegmentReader:
    """Reads segments for one engine. Safe to use from several threads."""

    def __init__(self, engine: TextSource, registries: SegmentRegistries, limit: TextLimit) -> None:
        self._engine = engine
        self._encoder = engine.encoder
        self._joiner = Joiner(engine.encoder)
        self._registries = registries
        self._limit = limit

    def encode(self, name: str, text: str) -> Segment:
        """A text tokenized alone.

        Raises:
            ApiError: 400 when it has no tokens.
            InvalidRequest: it cannot be tokenized, or has more tokens than the model takes.
        """
        self._limit.require(text)
        segment = Segment(self._encoder.plain(text, label=f"segment {name!r}"), name)
        if not segment.token_ids:
            raise ApiError(400, "empty_segment", f"the text of segment {name!r} has no tokens", param="content")
        return segment

    def digest(self, segment: Segment, tenant: str) -> str:
        """What clients know as the segment's hash; the same under every salt."""
        return segment.digest(self._engine.home(tenant))

    def prepare(
        self,
        inputs: Sequence[PromptSegment],
        rule: str,
        tail: PromptTail,
        tenant: str,
        sources: Iterable[FollowedAnswer] = (),
    ) -> PreparedPrompt:
        """Segments, and behind them the rest of a prompt.

        Args:
            rule: separate, strict or merge.
            sources: answers that followed segments stand for, in order.

        Raises:
            ApiError: 404 for an unknown name, 409 for a wrong hash or an answer that failed, 422 for a boundary that
                the rule refuses, 400 for a followed answer where none can be.
            InvalidRequest: a text that cannot be tokenized.
        """
        _require_separate(inputs, rule)
        found = iter(sources)
        read = [
            self._follow(each, index, tenant, next(found, None))
            if isinstance(each, FollowedSegment)
            else self._read(each, index, tenant)
            for index, each in enumerate(inputs)
        ]
        pieces = [each.piece for each in read]
        if tail.text:
            alone = Segment(self._encoder.plain(tail.text, label="the prompt"), tail.name)
            pieces.append(TextPiece("what follows the segments", tail.text, alone))
        joined = self._joiner.join(pieces, rule)
        first = Segment(self._encoder.start_ids)
        rest = _without(tail.segments, first.token_ids)
        segments = self._engine.read_prompt([first, *joined.segments, *rest], is_start=True)
        starts = [0, *joined.ends]
        offset = len(first.token_ids)
        placed = [
            PlacedSegment(each.id, each.digest, offset + start, offset + end)
            for each, start, end in zip(read, starts, joined.ends, strict=False)
        ]
        num_follows = accumulate(each.source is not None for each in read)
        lifetimes = [
            Lifetime(place.end, each.ttl_s, num)
            for each, place, num in zip(read, placed, num_follows, strict=True)
            if each.ttl_s is not None
        ]
        prompt = PreparedPrompt(segments, tuple(lifetimes), tuple(placed), tuple(_follows(read, segments)))
        return prompt.holding(tail.placed, prompt.num_tokens - _num_tokens(tail.segments))

    def _follow(self, given: FollowedSegment, index: int, tenant: str, source: FollowedAnswer | None) -> _Read:
        """An answer: its ids where it has ended, else an empty segment in its place."""
        label = f"segments[{index}] ({given.id!r})"
        if source is None:
            message = f"{label} is an answer that is followed, which only requests that generate can do; send its text"
            raise ApiError(400, "unsupported_value", message, param=f"segments[{index}]")
        ids = source.token_ids
        if ids is None and not source.is_in_progress:
            message = f"the answer that {label} follows has failed or was cancelled; ask for it again"
            raise ApiError(409, SOURCE_FAILED, message, param=f"segments[{index}]")
        segment = Segment(ids or (), given.id)
        ttl_s = None if given.ttl is None else seconds(given.ttl)
        return _Read(
            TextPiece(label, "", segment),
            given.id,
            self.digest(segment, tenant),
            ttl_s,
            source if ids is None else None,
        )

    def _read(self, given: SegmentInput, index: int, tenant: str) -> _Read:
        label = f"segments[{index}] ({given.id!r})"
        if isinstance(given, RegisteredSegment):
            kept = self._registries.of(tenant).get(given.name, given.version)
            text, segment, kind, digest, ttl = (
                kept.text,
                Segment(tuple(kept.token_ids)),
                kept.kind,
                kept.digest,
                kept.ttl,
            )
        else:
            text, kind, ttl = given.content, given.kind, None
            segment = self.encode(given.id, text)
            digest = self.digest(segment, tenant)
        if given.hash not in (None, digest):
            message = f"the hash of {label} is {digest}, not {given.hash}: its text, the model or the tenant is another"
            raise ApiError(409, "segment_hash_mismatch", message, param=f"segments[{index}].hash")
        name = given.id if kind == "dynamic" else f"{given.id}@{digest[:16]}"
        lasting = given.ttl or ttl
        piece = TextPiece(label, text, Segment(segment.token_ids, name))
        return _Read(piece, given.id, digest, None if lasting is None else seconds(lasting))


def _require_separate(inputs: Sequence[PromptSegment], rule: str) -> None:
    """Raises ApiError 400 for a followed answer under a rule that would need its text."""
    followed = next((index for index, each in enumerate(inputs) if isinstance(each, FollowedSegment)), None)
    if followed is not None and rule != "separate":
        message = f"segments[{followed}] is an answer, whose tokens are its own: choose boundary separate, not {rule}"
        raise ApiError(400, "unsupported_value", message, param="boundary")


def _follows(read: Sequence[_Read], segments: Sequence[Segment]) -> Iterator[Follow]:
    """Where in a prompt those stand that are not known yet: its segments without tokens are theirs, in order."""
    empty = (index for index, segment in enumerate(segments) if not segment.token_ids)
    for each in read:
        if each.piece.segment.token_ids:
            continue
        index = next(empty)
        if each.source is not None:
            yield Follow(index, each.id, each.source)


def _without(segments: tuple[Segment, ...], start: tuple[int, ...]) -> tuple[Segment, ...]:
    """Segments without the start tokens that a chat template wrote: they stand before everything else already."""
    if not segments or not start or segments[0].token_ids[: len(start)] != start:
        return segments
    return (replace(segments[0], token_ids=segments[0].token_ids[len(start) :]), *segments[1:])


def _num_tokens(segments: Sequence[Segment]) -> int:
    return sum(len(segment.token_ids) for segment in segments)
