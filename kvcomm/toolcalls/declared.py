"""Answers of models that bring a `response_template`: read by transformers' parser, for which the checkpoint wrote it.

The parser tells regions of an answer. Text and reasoning are passed on as they come; a call once its region has closed,
since only then it is known what it says. A region that cannot be read is text, and so is a call that a limit has cut:
without its last arguments it would look like a whole one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from kvcomm.toolcalls.writer import AnswerWriter, encodable

REASONING = ("reasoning_content", "reasoning", "thinking")
CALLS = "tool_calls"


class DeclaredParser:
    """Reads an answer, reasoning included, letter by letter: so that it never matters how it was cut."""

    def __init__(
        self,
        writer: AnswerWriter,
        template: Mapping[str, Any],
        *,
        prompt: str,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        """Make one.

        Args:
            prompt: the end of what stands before the answer, special tokens included; the answer may begin in a region.
            tools: their schemas, by which arguments get types; None: calls are text.
        """
        from transformers.utils.chat_parsing import ResponseParser

        self._writer = writer
        self._has_tools = tools is not None
        # What is missing is missing: an answer that was cut is no error.
        fields = {name: {**field, "optional": True} for name, field in template["fields"].items()}
        lenient = {**template, "fields": fields}
        make: Callable[..., Any] = ResponseParser  # which has no types
        self._make: Callable[[str], Any] = partial(_begun, make, lenient, [*map(dict, tools or ())])
        self._parser = self._make(prompt)
        self._raw: list[str] = []  # what was read of a region that has no value yet
        self._answer: list[str] = []  # all that was read

    def feed(self, text: str) -> None:
        """See `CallParser`."""
        for letter in text:
            self._answer.append(letter)
            try:
                events = self._parser.feed(letter)
            except (ValueError, KeyError, TypeError):  # a region closed that says nothing the template knows
                self._give_up(letter)
                continue
            self._read(events)

    def finish(self) -> None:
        """See `CallParser`."""
        try:
            _, events = self._parser.finalize()
        except (ValueError, KeyError, TypeError):
            self._give_up("")
            return
        self._read(events)

    def _give_up(self, letter: str) -> None:
        self._writer.text("".join(self._raw) + letter)
        self._raw.clear()
        self._parser = self._make("")

    def _read(self, events: Sequence[Mapping[str, Any]]) -> None:
        for event in events:
            field, kind = event["field"], event["type"]
            if kind == "region_chunk":
                self._take(field, event["text"], is_raw=bool(event.get("dirty")))
            elif kind == "region_close":
                if field in REASONING:
                    self._writer.end_reasoning()
                elif field == CALLS and self._has_tools and not self._is_cut:
                    self._call(event["value"])
                elif self._raw:
                    self._writer.text("".join(self._raw))
                self._raw.clear()

    @property
    def _is_cut(self) -> bool:
        """Whether a region only closes because a limit was reached in it: nothing stands behind what was read of it."""
        return self._writer.is_cut and "".join(self._answer).endswith("".join(self._raw))

    def _take(self, field: str, text: str, *, is_raw: bool) -> None:
        if field in REASONING and not is_raw:
            self._writer.reasoning(text)
        elif is_raw or field == CALLS:
            self._raw.append(text)
        else:
            self._writer.text(text)

    def _call(self, value: Any) -> None:
        for each in value if isinstance(value, list) else [value]:
            function = each.get("function", each) if isinstance(each, dict) else {}
            name, arguments = function.get("name"), function.get("arguments", function.get("parameters", {}))
            if not isinstance(name, str):
                self._writer.text("".join(self._raw))
                return
            self._writer.begin_call(name)
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            self._writer.arguments(encodable(text))
            self._writer.end_call()


def _begun(make: Callable[..., Any], template: Mapping[str, Any], tools: Sequence[Any], prompt: str) -> Any:
    return make(template, prefix=prompt, tools=tools)
