"""How the texts of a prompt meet: the three boundary rules.

Tokenizers read across what people think of as pieces, so where two texts meet somebody has to decide: each is
tokenized alone (`apart`), the same but refused where the whole text would be tokenized differently (`strict`), or the
whole is tokenized as one and tokens across a boundary belong to nobody (`merged`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from kvcomm.engine.encoding import TextEncoder, TokenSpan
from kvcomm.memory.segments import Segment, token_ids_of
from kvcomm.server.errors import ApiError


class TextPiece(NamedTuple):
    """A text of a prompt; `label` is for errors, `segment` holds its tokens when it is tokenized alone."""

    label: str
    text: str
    segment: Segment


class JoinedSegments(NamedTuple):
    """Pieces as segments; `ends`: for each piece one past its last token, counted from the first piece's start."""

    segments: tuple[Segment, ...]
    ends: tuple[int, ...]


class Joiner:
    """Puts pieces together. Safe to use from several threads."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    def join(self, pieces: Sequence[TextPiece], rule: str) -> JoinedSegments:
        """The pieces by the rule `separate`, `strict` or `merge`; raises what those raise."""
        rules = {"separate": self.apart, "strict": self.strict, "merge": self.merged}
        return rules[rule](pieces)

    def apart(self, pieces: Sequence[TextPiece]) -> JoinedSegments:
        """Each piece tokenized alone: the same text has the same tokens behind any other."""
        segments = tuple(piece.segment for piece in pieces)
        return JoinedSegments(segments, tuple(accumulate(len(segment.token_ids) for segment in segments)))

    def strict(self, pieces: Sequence[TextPiece]) -> JoinedSegments:
        """The same, where it equals the tokens of the whole text.

        Raises:
            ApiError: 422 naming the first boundary where it does not.
            InvalidRequest: this tokenizer does not say where its tokens lie.
        """
        joined, spans = self.apart(pieces), self._spans(pieces)
        whole = [span.token_id for span in spans]
        alone = token_ids_of(joined.segments)
        for index, (end, num_tokens) in enumerate(zip(_text_ends(pieces)[:-1], joined.ends[:-1], strict=True)):
            crossing = [span for span in spans if span.start < end < span.end]
            if crossing or whole[:num_tokens] != alone[:num_tokens]:
                raise _split_boundary(pieces, index)
        return joined

    def merged(self, pieces: Sequence[TextPiece]) -> JoinedSegments:
        """The whole text tokenized as one; a token that two pieces share is a segment of its own, without a name.

        Raises:
            InvalidRequest: this tokenizer does not say where its tokens lie.
        """
        boundaries = _text_ends(pieces)
        spans = self._spans(pieces)
        owners = [_owner(span, boundaries) for span in spans]
        segments: list[Segment] = []
        at = 0
        while at < len(spans):
            end = at
            while end < len(spans) and owners[end] == owners[at]:
                end += 1
            owner = owners[at]
            name = None if owner is None else pieces[owner].segment.name
            segments.append(Segment(tuple(span.token_id for span in spans[at:end]), name))
            at = end
        return JoinedSegments(tuple(segments), tuple(sum(span.end <= end for span in spans) for end in boundaries))

    def _spans(self, pieces: Sequence[TextPiece]) -> list[TokenSpan]:
        return self._encoder.spans("".join(piece.text for piece in pieces))


def _text_ends(pieces: Sequence[TextPiece]) -> list[int]:
    return list(accumulate(len(piece.text) for piece in pieces))


def _owner(span: TokenSpan, boundaries: Sequence[int]) -> int | None:
    """Which piece a token belongs to; None: it lies across a boundary."""
    index = sum(end <= span.start for end in boundaries[:-1])
    return index if span.end <= boundaries[index] else None


def _split_boundary(pieces: Sequence[TextPiece], index: int) -> ApiError:
    before, after = pieces[index], pieces[index + 1]
    message = (
        f"the boundary between {before.label} and {after.label} would split a token: ...{before.text[-12:]!r} meets "
        f"{after.text[:12]!r}...; end the first text with a line break, or choose boundary separate or merge"
    )
    return ApiError(422, "boundary_splits_token", message, param="segments")
