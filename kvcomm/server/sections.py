"""Rendered prompts cut at control tokens, where a tokenizer treats what is between them one by one.

Nearly all do: control tokens are found before anything else is looked at, and what is left is tokenized piece by piece.
Some put a space before the first piece only, or take spaces beside a control token into it; those are not cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

PROBES = (" a1 b\n", "\n 2 c", "d  ", "E")
"""Texts with what tokenizers treat differently at their ends."""


class Sections:
    """Cuts the texts of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, controls: re.Pattern[str] | None) -> None:
        """`controls` finds the tokenizer's control tokens; None: it has none."""
        self._tokenizer = tokenizer
        tokens = {token.content: (id, token) for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._ids = {content: id for content, (id, _) in tokens.items()}
        is_plain = not any(token.lstrip or token.rstrip or token.single_word for _, token in tokens.values())
        self._controls = controls if is_plain else None
        if not self._is_cut_alike():
            self._controls = None

    def of(self, text: str) -> Iterator[int | str]:
        """Ids of control tokens and the texts between them, in order; the whole text where nothing may be cut."""
        end = 0
        for found in self._controls.finditer(text) if self._controls is not None else ():
            if found.start() > end:
                yield text[end : found.start()]
            yield self._ids[found[0]]
            end = found.end()
        if end < len(text):
            yield text[end:]

    def _is_cut_alike(self) -> bool:
        """Whether tokenizing piece by piece gives what tokenizing all at once does, for every control token."""
        for control in self._ids:
            text = PROBES[0] + "".join(control + probe for probe in PROBES) + control
            cut: list[int] = []
            for part in self.of(text):
                cut += [part] if isinstance(part, int) else self._encode(part)
            if cut != self._encode(text):
                return False
        return True

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))
