"""From what a client sends to segments for the engine.

A conversation is rendered by the model's chat template and tokenized as one text, so requests that begin alike share
their KV exactly, whoever rendered them. Control tokens spelled out in messages or tools are ordinary text and cannot
end a turn; the template's own ones are real. A plain completion's text is taken as it is. This is the place where
requests that bring segments or a context put those in front.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, cast

from kvcomm.agents.rendering import PromptRenderer
from kvcomm.engine.engine import Engine
from kvcomm.memory.segments import Segment
from kvcomm.server.errors import ApiError
from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.messages import AssistantMessage, TextPart, ToolCall, ToolMessage

ROLES = {"developer": "system"}
"""Roles that chat templates know by an older name."""


class PromptMaker:
    """Renders and tokenizes for one engine. Safe to use from several threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._renderer = PromptRenderer(engine)

    def chat(self, request: ChatRequest) -> tuple[Segment, ...]:
        """The prompt of a conversation, up to where the assistant speaks.

        Raises:
            ApiError: 400 when the model has no chat template, or the template rejects the conversation.
            InvalidRequest: it cannot be tokenized.
        """
        marks = _Marks(self._control_pattern)
        messages = [_values(message) for message in request.messages]
        tools = None
        if request.tools and request.tool_choice != "none":
            tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
        variables = {} if request.reasoning_effort is None else {"reasoning_effort": request.reasoning_effort}
        text = self._render(marks.hide(messages), marks.hide(tools), variables)
        ids: list[int] = []
        for piece, control in marks.split(text):
            ids += self._engine.segment(piece).token_ids
            if control is not None:
                ids += self._renderer.encode_input("messages", control)
        return self._engine.read_prompt([Segment(tuple(ids))], is_start=True)

    def completion(self, prompt: str | list[int]) -> tuple[Segment, ...]:
        """The prompt of a plain completion.

        Raises:
            InvalidRequest: no tokens, or ids that the model does not know.
        """
        return self._engine.read_prompt(prompt, is_start=True)

    @cached_property
    def _control_pattern(self) -> re.Pattern[str] | None:
        added = self._engine.tokenizer.added_tokens_decoder.values()
        contents = sorted((token.content for token in added if token.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, contents))) if contents else None

    def _render(self, messages: Any, tools: Any, variables: Mapping[str, Any]) -> str:
        from jinja2 import TemplateError

        tokenizer = self._engine.tokenizer
        if not tokenizer.chat_template:
            message = "this model has no chat template; use /v1/completions with a prompt of your own"
            raise ApiError(400, "no_chat_template", message)
        try:
            text = tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=True, **variables
            )
        except TemplateError as error:
            message = f"the model's chat template rejects these messages: {error}"
            raise ApiError(400, "template_error", message, param="messages") from error
        return cast("str", text)


class _Marks:
    """Stand-ins for control tokens that a client spelled out, while the template is rendered."""

    def __init__(self, pattern: re.Pattern[str] | None) -> None:
        self._pattern = pattern
        self._stem = f"MARK{secrets.token_hex(12)}N"  # letters and digits: templates leave it alone, nobody guesses it
        self._hidden: list[str] = []

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

    def split(self, text: str) -> list[tuple[str, str | None]]:
        """Pieces of rendered text, each with the control token spelled out behind it."""
        pieces = re.split(self._stem + r"(\d+)X", text)
        controls = [self._hidden[int(number)] for number in pieces[1::2]]
        return list(zip(pieces[::2], [*controls, None], strict=True))

    def _mark(self, found: re.Match[str]) -> str:
        self._hidden.append(found[0])
        return f"{self._stem}{len(self._hidden) - 1}X"


def _values(message: Any) -> dict[str, Any]:
    """A message as chat templates expect it."""
    values: dict[str, Any] = {"role": ROLES.get(message.role, message.role), "content": text_of(message.content)}
    if getattr(message, "name", None) is not None:
        values["name"] = message.name
    if isinstance(message, ToolMessage):
        values["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage) and message.tool_calls:
        values["tool_calls"] = [_call_values(call) for call in message.tool_calls]
    return values


def _call_values(call: ToolCall) -> dict[str, Any]:
    """A tool call; templates write its arguments as JSON themselves, so they get the object."""
    arguments: Any = call.function.arguments
    try:
        parsed = json.loads(arguments)
    except ValueError:
        parsed = None
    values = parsed if isinstance(parsed, dict) else arguments
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": values}}


def text_of(content: str | list[TextPart] | None) -> str:
    """A message's text."""
    if content is None:
        return ""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def num_tokens(prompt: tuple[Segment, ...]) -> int:
    """Tokens of a prompt."""
    return sum(len(segment.token_ids) for segment in prompt)


Maker = Callable[[], tuple[Segment, ...]]
"""Makes a prompt, in a worker thread."""
