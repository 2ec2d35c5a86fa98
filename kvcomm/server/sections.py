"""Rendered prompts cut at control tokens, where a tokenizer treats what is between them one by one.

Nearly all do: control tokens are found before anything else is looked at, and what is left is tokenized piece by piece.
Some take spaces beside a control token into it, or know other added tokens that do; those are not cut.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvcomm.engine.encoding import TextEncoder

PROBES = (" a1 b\n", "\n 2 c", "d  ", "E")
"""Texts with what tokenizers treat differently at their ends."""


class Sections:
    """Cuts the texts of one tokenizer."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._ids = encoder.controls
        self._controls = encoder.control_pattern if encoder.has_plain_controls else None
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
                cut += [part] if isinstance(part, int) else self._encoder.piece(part)
            if tuple(cut) != self._encoder.piece(text):
                return False
        return True
