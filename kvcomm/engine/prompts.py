"""From what a user gives as a prompt to segments of token ids.

Every segment is tokenized on its own, as a piece of a text, so the same text has the same ids behind any prefix, and
behind none; a text given as one string is tokenized as one, at the start of a context as the tokenizer does it. Start
tokens stand at the very beginning of a context, once, if the tokenizer adds any; ids are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvcomm import values
from kvcomm.engine.encoding import TextEncoder
from kvcomm.errors import EmptyPrompt, InvalidRequest, PromptTooLong, UnknownToken
from kvcomm.memory.segments import Prompt, Segment


class PromptReader:
    """Tokenizes and checks prompts for one model."""

    def __init__(self, encoder: TextEncoder, *, vocab_size: int, max_context: int) -> None:
        self._encoder = encoder
        self._vocab_size = vocab_size
        self._max_context = max_context

    def segment(self, text: str, *, name: str | None = None) -> Segment:
        """Tokenize a text on its own, as a piece of a prompt; see `TextEncoder.piece`.

        Raises:
            InvalidRequest: text or name is none.
        """
        checked = None if name is None else values.text("a segment's name", name)
        return Segment(self._encoder.piece(values.text("a segment", text)), checked)

    def read(self, prompt: Prompt, *, is_start: bool) -> tuple[Segment, ...]:
        """The segments of a prompt; those without tokens only where they have a name, as slots that nothing stands in.

        Args:
            is_start: nothing stands before it, so the tokenizer's start tokens (if any) belong to a text or segments.

        Raises:
            EmptyPrompt: not a single token.
            UnknownToken: an id outside the vocabulary.
            InvalidRequest: neither text, ids nor segments.
        """
        segments = self._segments(prompt, is_start)
        if not any(segment.token_ids for segment in segments):
            raise EmptyPrompt(f"the prompt has no tokens: {values.shown(prompt)}")
        return tuple(segment for segment in segments if segment.token_ids or segment.name is not None)

    def require_fits(self, num_tokens: int, max_new_tokens: int) -> None:
        """Raises PromptTooLong when prompt and answer exceed the model's limit; gives the numbers."""
        if num_tokens + max_new_tokens > self._max_context:
            raise PromptTooLong(
                f"{num_tokens} prompt tokens and up to {max_new_tokens} new ones exceed the model's limit of "
                f"{self._max_context}; shorten the prompt or lower max_new_tokens"
            )

    def checked(self, segment: Segment) -> Segment:
        """The same segment with ids of Python's own, all of them known to the model.

        Raises:
            UnknownToken: an id outside the vocabulary.
            InvalidRequest: ids or a name that are none.
        """
        ids = tuple(_token_id(item) for item in values.items("a segment", segment.token_ids, "a tuple of token ids"))
        self.require_known(ids)
        return Segment(ids, None if segment.name is None else values.text("a segment's name", segment.name))

    def require_known(self, token_ids: Iterable[int]) -> None:
        """Raises UnknownToken for an id outside the vocabulary."""
        unknown = next((token for token in token_ids if not 0 <= token < self._vocab_size), None)
        if unknown is not None:
            raise UnknownToken(f"token id {values.shown(unknown)} is outside the vocabulary of {self._vocab_size}")

    def _segments(self, prompt: Prompt, is_start: bool) -> Sequence[Segment]:
        if isinstance(prompt, str):
            text = values.text("the prompt", prompt)
            return [self.checked(Segment(self._encoder.start(text) if is_start else self._encoder.piece(text)))]
        found = values.items("the prompt", prompt, "a text, a list of token ids or a list of segments")
        segments = [item for item in found if isinstance(item, Segment)]
        if segments and len(segments) < len(found):
            raise InvalidRequest("a prompt is a text, a list of token ids or a list of segments, not a mixture")
        if not segments:
            return [self.checked(Segment(found))]  # type: ignore[arg-type]  # which is what is checked
        segments = [self.checked(segment) for segment in segments]
        first = next((segment.token_ids for segment in segments if segment.token_ids), ())
        before = self._encoder.before(first) if is_start and first else ()
        return [Segment(before), *segments] if before else segments


def _token_id(item: object) -> int:
    if type(item) is int:  # nearly always
        return item
    try:
        return values.whole_number("a token id", item)
    except InvalidRequest:
        raise InvalidRequest(f"{values.shown(item)} is neither a token id nor a segment") from None
