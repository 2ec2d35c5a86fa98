"""Stand-ins for control tokens that a client spelled out, while a chat template is rendered.

Templates leave them alone, and nobody can guess them; when the text is tokenized they are ordinary text again.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import Any


class Marks:
    """The stand-ins of one rendering, or of all renderings of one conversation.

    Attributes:
        stem: of letters and digits: templates leave it alone, nobody guesses it.
        hidden: what stands for what, by number.
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
        self._marks: dict[str, str] = {}

    def hide(self, value: Any) -> Any:
        """The JSON value with every control token in its texts replaced."""
        if self._pattern is None:
            return value
        if isinstance(value, str):
            return self._pattern.sub(self._mark, value)
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        if isinstance(value, dict):
            return {self.hide(name): self.hide(item) for name, item in value.items()}
        return value

    def hide_messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with control tokens replaced, but in answers those that the chat template looks for itself."""
        return [self._hide_message(message) for message in messages]

    def _hide_message(self, message: dict[str, Any]) -> dict[str, Any]:
        hidden: dict[str, Any] = self.hide(message)
        content = message.get("content")
        if message.get("role") == "assistant" and isinstance(content, str):
            hidden["content"] = content if self._in_answers is None else self._in_answers.sub(self._mark, content)
        return hidden

    def split(self, text: str) -> list[tuple[str, str | None]]:
        """Pieces of rendered text, each with the control token spelled out behind it."""
        if not self.hidden:  # nearly always; compiling the pattern takes half a millisecond
            return [(text, None)]
        pieces = re.split(self.stem + r"(\d+)X", text)
        controls = [self.hidden[int(number)] for number in pieces[1::2]]
        return list(zip(pieces[::2], [*controls, None], strict=True))

    def stand_in(self, text: str) -> str:
        """What stands for a text."""
        self.hidden.append(text)
        return f"{self.stem}{len(self.hidden) - 1}X"

    def _mark(self, found: re.Match[str]) -> str:
        if found[0] not in self._marks:  # one for each control token: a text may spell out very many
            self._marks[found[0]] = self.stand_in(found[0])
        return self._marks[found[0]]
