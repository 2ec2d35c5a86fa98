"""Stand-ins for what a chat template must neither see nor change, while it is rendered.

Two things are kept from templates: control tokens that somebody's text spells out, which are ordinary text when it is
tokenized, and slots, the places of texts that become segments of their own. Templates leave stand-ins alone, and nobody
can guess them, so no text is ever taken for one. A control token's may come up anywhere or be dropped; a slot's has to
come up once, and slots in the order in which they were made.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from kvcomm.errors import TemplateError

S = TypeVar("S")


class Marks(Generic[S]):
    """The stand-ins of one rendering, or of all renderings of one conversation.

    Attributes:
        stem: of letters and digits: templates leave it alone, nobody guesses it.
        hidden: what stands for what, by number; nothing for slots.
        slots: those of this rendering, by number.
    """

    def __init__(
        self,
        pattern: re.Pattern[str] | None = None,
        stem: str | None = None,
        hidden: Sequence[str] = (),
        *,
        in_answers: re.Pattern[str] | None = None,
    ) -> None:
        """`pattern` finds control tokens, `in_answers` those to be hidden in an assistant's own words; None: none.

        `stem` and `hidden` are those of marks made before.
        """
        self._pattern = pattern
        self._in_answers = in_answers
        self.stem = stem or f"MARK{secrets.token_hex(12)}N"
        self.hidden = list(hidden)
        self.slots: dict[int, S] = {}
        self._marks: dict[str, str] = {}

    def hide(self, value: Any) -> Any:
        """The JSON value with every control token in its texts replaced."""
        if self._pattern is None:
            return value
        if isinstance(value, str):
            return self._pattern.sub(self._mark, value)
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        if isinstance(value, dict):
            return {self.hide(name): self.hide(item) for name, item in value.items()}
        return value

    def hide_text(self, text: str, role: str) -> str:
        """A message's text likewise, but in answers without those that the chat template looks for itself."""
        pattern = self._in_answers if role == "assistant" else self._pattern
        return text if pattern is None else pattern.sub(self._mark, text)

    def stand_in(self, text: str) -> str:
        """What stands for a text."""
        self.hidden.append(text)
        return f"{self.stem}{len(self.hidden) - 1}X"

    def open(self, slot: S) -> str:
        """What stands for a slot."""
        self.slots[len(self.hidden)] = slot
        return self.stand_in("")

    def split(self, text: str) -> list[tuple[str, str | None]]:
        """Pieces of rendered text without slots, each with the control token spelled out behind it."""
        if not self.hidden:  # nearly always; compiling the pattern takes half a millisecond
            return [(text, None)]
        pieces = re.split(self.stem + r"(\d+)X", text)
        controls = [self.hidden[int(number)] for number in pieces[1::2]]
        return list(zip(pieces[::2], [*controls, None], strict=True))

    def cut(self, text: str, label: Callable[[S], str]) -> list[str | S]:
        """Rendered text in turn with its slots; no text is empty, and those of control tokens are still hidden.

        Args:
            label: what errors call a slot.

        Raises:
            TemplateError: a slot was dropped, repeated or moved; names it.
        """
        if not self.slots:
            return [text] if text else []
        marks = re.finditer(self.stem + r"(\d+)X", text)
        found = [(int(mark[1]), mark.span()) for mark in marks if int(mark[1]) in self.slots]
        self._require_order([number for number, _ in found], label)
        pieces: list[str | S] = []
        at = 0
        for number, (start, end) in found:
            pieces += [text[at:start], self.slots[number]]
            at = end
        pieces.append(text[at:])
        return [piece for piece in pieces if piece != ""]

    def _require_order(self, found: Sequence[int], label: Callable[[S], str]) -> None:
        counts = Counter(found)
        for number, slot in self.slots.items():
            if not counts[number]:
                raise TemplateError(f"{label(slot)}: the chat template drops it; move it to another place")
            if counts[number] > 1:
                raise TemplateError(f"{label(slot)}: the chat template repeats it, so its text would stand there twice")
        for number, (wanted, slot) in zip(found, self.slots.items(), strict=True):
            if number != wanted:
                raise TemplateError(f"{label(slot)}: the chat template changes the order of what it is given")

    def _mark(self, found: re.Match[str]) -> str:
        if found[0] not in self._marks:  # one for each control token: a text may spell out very many
            self._marks[found[0]] = self.stand_in(found[0])
        return self._marks[found[0]]
