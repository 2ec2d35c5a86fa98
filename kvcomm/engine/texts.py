"""Between token ids and text, as answers are written: for whoever shows tokens, or searches texts for them."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from kvcomm.engine.detokenize import Detokenizer
from kvcomm.engine.token_texts import TokenTexts


class Texts:
    """The texts of one tokenizer's tokens.

    Attributes:
        plain: of tokens without the texts of special ones.
        shown: of all tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.plain = TokenTexts(tokenizer)
        self.shown = TokenTexts(tokenizer, skip_special_tokens=False)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of token ids, special tokens included."""
        return self.plain.decode(list(token_ids), skip_special_tokens=False)

    def locate(self, token_ids: Iterable[int]) -> tuple[str, tuple[int, ...]]:
        """Text of token ids, special tokens included, and where in it the text of each begins; see `Choice`."""
        detokenizer = Detokenizer(self._tokenizer, texts=self.shown)
        for token_id in token_ids:
            detokenizer.push(token_id)
        detokenizer.finish()
        return detokenizer.text, detokenizer.starts(0, detokenizer.num_placed)

    def lost_space(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The space that the text of an answer lacks at its start and has behind a prompt, or nothing.

        Args:
            token_ids: of the answer; those with its first text will do.
            skip_special_tokens: as in the request.
        """
        texts = self.plain if skip_special_tokens else self.shown
        first = next(([token_id] for token_id in token_ids if not texts.is_silent(token_id)), [])
        return " " if first and texts.behind(first) == " " + texts.decode(first) else ""

    def token_text(self, token_id: int) -> str:
        """Text of one token behind others, with the space that the start of a text may lose."""
        return self.plain.behind([token_id])

    def token_bytes(self, token_id: int) -> bytes:
        """The same in UTF-8; also of a token that is a part of a character only."""
        return self.plain.bytes_of(token_id)
