"""Rendered prompts cut at control tokens, where a tokenizer treats what is between them one by one.

Nearly all do: control tokens are found before anything else is looked at, and what is left is tokenized piece by piece.
Some put a space before the first piece only, or take spaces beside a control token into it; those are not cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

PROBES = (" a1 b\n", "\n 2 c", "d  ", "E")
"""Texts with what tokenizers treat differently at their ends."""


class Sections:
    """Cuts the texts of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        tokens = [(token_id, token) for token_id, token in tokenizer.added_tokens_decoder.items() if token.special]
        self._ids = {token.content: token_id for token_id, token in tokens}
        is_plain = not any(token.lstrip or token.rstrip or token.single_word for _, token in tokens)
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        if not (is_plain and self._pattern is not None and self._is_cut_alike(longest_first)):
            self._pattern = None

    def of(self, text: str) -> Iterator[int | str]:
        """Ids of control tokens and the texts between them, in order; the whole text where nothing may be cut."""
        if self._pattern is None:
            yield text
            return
        for index, part in enumerate(self._pattern.split(text)):
            if index % 2:
                yield self._ids[part]
            elif part:
                yield part

    def _is_cut_alike(self, controls: Sequence[str]) -> bool:
        """Whether tokenizing piece by piece gives what tokenizing all at once does, for every control token."""
        for control in controls:
            text = PROBES[0] + "".join(control + probe for probe in PROBES) + control
            cut: list[int] = []
            for part in self.of(text):
                cut += [part] if isinstance(part, int) else self._encode(part)
            if cut != self._encode(text):
                return False
        return True

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))
