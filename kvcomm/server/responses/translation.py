"""From a request of the Responses API to a chat request.

A response's items are chat messages: what the model thought, said and called between two inputs is one message of the
assistant. What the chat surface has against a request is told by the names that this API has for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.response_items import SentCall, SentCallOutput, SentMessage, SentReasoning
from kvcomm.server.schemas.responses import (
    AllowedFunctions,
    NamedFunction,
    ResponsePrompt,
    ResponseRequest,
    SchemaFormat,
)
from kvcomm.server.translation import chat_of

SentItem = SentMessage | SentCall | SentCallOutput | SentReasoning

SAME_FIELDS = (
    "stream",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "top_k",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "cache_salt",
    "reuse",
    "prompt_cache_options",
)
"""Of a request, with the same meaning in a chat request."""

NAMES = {
    r"messages.*": "input",
    r"max_(completion_)?tokens": "max_output_tokens",
    r"response_format(\.json_schema)?": "text.format",
    r"reasoning_effort": "reasoning.effort",
    r"context_id": "previous_response_id",
    r"(tools\[[0-9]+\])\.function": r"\1",
}
"""Parameters of chat requests by this API's names."""


def items_of(request: ResponsePrompt) -> list[SentItem]:
    """A request's input as items."""
    if isinstance(request.input, str):
        return [SentMessage(role="user", content=request.input)]
    return list(request.input)


def chat_request(request: ResponsePrompt, items: Sequence[SentItem], *, is_whole: bool = True) -> ChatRequest:
    """The chat request of items; `is_whole`: they begin the conversation, which the instructions stand before.

    Raises:
        ApiError: 400, the chat surface does not take it.
    """
    messages = messages_of(items)
    if is_whole and request.instructions is not None:
        messages.insert(0, {"role": "system", "content": request.instructions})
    fields: dict[str, Any] = {"model": request.model, "messages": messages}
    if request.tools:
        fields["tools"] = [_tool(tool.model_dump()) for tool in request.tools]
        fields["parallel_tool_calls"] = request.parallel_tool_calls
    fields["tool_choice"] = _tool_choice(request)
    if request.reasoning is not None:
        fields["reasoning_effort"] = request.reasoning.effort
    fields["response_format"] = _format(request)
    if isinstance(request, ResponseRequest):
        fields |= _sampling(request)
    return chat_of(fields, NAMES)


def messages_of(items: Iterable[SentItem]) -> list[dict[str, Any]]:
    """Chat messages that say what the items do."""
    messages: list[dict[str, Any]] = []
    for is_answer, group in groupby(items, _is_answers):
        if is_answer:
            messages += _answers(list(group))
        else:
            messages += [_message(item) for item in group]
    return messages


def _is_answers(item: SentItem) -> bool:
    return isinstance(item, SentCall | SentReasoning) or (isinstance(item, SentMessage) and item.role == "assistant")


def _answers(items: Sequence[SentItem]) -> list[dict[str, Any]]:
    """The assistant's messages: thoughts, then at most one text, then calls are one."""
    messages: list[dict[str, Any]] = []
    last = 0
    for item in items:
        rank = 1 if isinstance(item, SentReasoning) else 2 if isinstance(item, SentMessage) else 3
        if not messages or rank < last or (rank == last == 2):
            messages.append({"role": "assistant"})
        last = rank
        _add(messages[-1], item)
    return messages


def _add(message: dict[str, Any], item: SentItem) -> None:
    """Put one item into a message of the assistant."""
    if isinstance(item, SentReasoning):
        texts = item.content or item.summary or ()
        thought = "".join(part.text for part in texts)
        if thought:
            message["reasoning_content"] = message.get("reasoning_content", "") + thought
    elif isinstance(item, SentMessage):
        message["content"] = _content(item.content)
    elif isinstance(item, SentCall):
        function = {"name": item.name, "arguments": item.arguments}
        message.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})


def _message(item: SentItem) -> dict[str, Any]:
    if isinstance(item, SentCallOutput):
        return {"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)}
    assert isinstance(item, SentMessage), item
    return {"role": item.role, "content": _content(item.content)}


def _content(content: str | Sequence[Any]) -> str | list[dict[str, Any]]:
    if isinstance(content, str) or not content:
        return content if isinstance(content, str) else ""
    return [_part(part) for part in content]


def _part(part: Any) -> dict[str, Any]:
    marked = getattr(part, "prompt_cache_breakpoint", None)
    mark = {} if marked is None else {"prompt_cache_breakpoint": marked}
    return {"type": "text", "text": part.text, **mark}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool[name] is not None}}


def _tool_choice(request: ResponsePrompt) -> Any:
    choice = request.tool_choice
    if isinstance(choice, NamedFunction):
        return _named(choice)
    if isinstance(choice, AllowedFunctions):
        allowed = {"mode": choice.mode, "tools": [_named(tool) for tool in choice.tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice


def _named(tool: NamedFunction) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.name}}


def _format(request: ResponsePrompt) -> dict[str, Any] | None:
    form = None if request.text is None else request.text.format
    if not isinstance(form, SchemaFormat):
        return None if form is None else {"type": form.type}
    schema = form.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
    return {"type": "json_schema", "json_schema": schema}


def _sampling(request: ResponseRequest) -> dict[str, Any]:
    fields = {name: getattr(request, name) for name in SAME_FIELDS}
    fields["max_completion_tokens"] = request.max_output_tokens
    if request.wants_logprobs:
        fields |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    return fields
