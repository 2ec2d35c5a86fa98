"""From a request of the Messages API to a chat request.

Results of calls are messages of their own in a chat, and come before what else their turn says. Lifetimes that
breakpoints name count for the whole prompt, as in chat requests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from kvcomm.server.errors import ApiError
from kvcomm.server.schemas.anthropic import (
    NO_THREAD,
    AssistantTurn,
    ClientTool,
    MessagesPrompt,
    MessagesRequest,
    MessageTurn,
    NamedToolChoice,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    UserTurn,
)
from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.common import CacheControl, seconds
from kvcomm.server.translation import chat_of

SAME_FIELDS = (
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "cache_salt",
    "reuse",
)
"""Of a request, with the same meaning in a chat request."""

THINKING = ("enable_thinking", "thinking")
"""What chat templates call it."""

CHOICES = {"auto": "auto", "any": "required", "none": "none"}
FAILED = "Error: "
"""Stands before the result of a call that failed, which chat templates have no other place for."""

NAMES = {
    r"messages.*": "messages",
    r"max_(completion_)?tokens": "max_tokens",
    r"stop\b": "stop_sequences",
    r"response_format(\.json_schema)?": "output_config.format",
    r"reasoning_effort": "output_config.effort",
    r"(tools\[[0-9]+\])\.function\.parameters": r"\1.input_schema",
    r"(tools\[[0-9]+\])\.function": r"\1",
    r"prompt_cache_options": "cache_control",
    r"chat_template_kwargs": "thinking",
}
"""Parameters of chat requests by this API's names."""


def chat_request(request: MessagesPrompt) -> ChatRequest:
    """The chat request that says the same.

    Raises:
        ApiError: 400, the chat surface does not take it, or it is for a thread.
    """
    if request.thread is not None:  # Anthropic's client knows this code, and goes on without
        raise ApiError(400, "thread_unsupported_request", f"thread {NO_THREAD}", param="thread")
    messages = list(_messages(request))
    fields: dict[str, Any] = {"model": request.model, "messages": messages}
    if messages[-1]["role"] == "assistant" and messages[-1].get("content") and "tool_calls" not in messages[-1]:
        fields["continue_final_message"] = True
    if request.tools:
        choice = request.tool_choice
        fields["tools"] = [_tool(tool) for tool in request.tools]
        fields["tool_choice"] = _tool_choice(request)
        if choice is not None and choice.disable_parallel_tool_use is not None:
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    elif request.tool_choice is not None and request.tool_choice.type in ("any", "tool"):
        fields["tool_choice"] = _tool_choice(request)  # refused by the chat surface, which knows why
    if request.thinking is not None:
        fields["chat_template_kwargs"] = dict.fromkeys(THINKING, request.thinking.type != "disabled")
    if (output := request.output_config) is not None:
        fields["reasoning_effort"] = output.effort
        if output.format is not None:
            schema = {"name": "output", "schema": output.format.schema_, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if (ttl := longest_ttl(request)) is not None:
        fields["prompt_cache_options"] = {"ttl": ttl}
    if isinstance(request, MessagesRequest):
        fields |= {name: getattr(request, name) for name in SAME_FIELDS}
        fields |= {"max_completion_tokens": request.max_tokens, "stop": request.stop_sequences}
    return chat_of(fields, NAMES)


def breakpoints_of(request: MessagesPrompt) -> list[CacheControl]:
    """All breakpoints of a request, wherever they are."""
    marked: list[Any] = [request, *(request.tools or ())]
    for content in (request.system, *(turn.content for turn in request.messages)):
        for block in content if isinstance(content, list) else ():
            marked.append(block)
            if isinstance(block, ToolResultBlock) and isinstance(block.content, list):
                marked += block.content
    controls = (getattr(each, "cache_control", None) for each in marked)
    return [control for control in controls if control is not None]


def longest_ttl(request: MessagesPrompt) -> str | None:
    """The longest lifetime that a breakpoint names, if one does."""
    return max((each.ttl for each in breakpoints_of(request) if each.ttl is not None), key=seconds, default=None)


def _messages(request: MessagesPrompt) -> Iterator[dict[str, Any]]:
    if request.system:
        yield {"role": "system", "content": _content(request.system)}
    for turn in request.messages:
        yield from _turn(turn)


def _turn(turn: MessageTurn) -> Iterator[dict[str, Any]]:
    if isinstance(turn.content, str):
        yield {"role": turn.role, "content": turn.content}
    elif isinstance(turn, AssistantTurn):
        yield _answer(turn.content)
    elif isinstance(turn, UserTurn):
        for block in turn.content:
            if isinstance(block, ToolResultBlock):
                yield _result(block)
        texts = [block for block in turn.content if isinstance(block, TextBlock)]
        if texts:
            yield {"role": "user", "content": _content(texts)}
    else:
        yield {"role": turn.role, "content": _content(turn.content)}


def _answer(blocks: Sequence[Any]) -> dict[str, Any]:
    """An earlier answer; thoughts that nobody here can read are left out."""
    message: dict[str, Any] = {"role": "assistant"}
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
    if texts:
        message["content"] = _content(texts)
    elif not calls:
        message["content"] = ""
    if any(thoughts):
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = [_call(block) for block in calls]
    return message


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _result(block: ToolResultBlock) -> dict[str, Any]:
    content = _content(block.content or "")
    if block.is_error:
        if isinstance(content, str):
            content = FAILED + content
        else:
            content.insert(0, {"type": "text", "text": FAILED})
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _content(content: str | Sequence[TextBlock]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [_part(block) for block in content] or ""


def _part(block: TextBlock) -> dict[str, Any]:
    mark = {} if block.cache_control is None else {"cache_control": block.cache_control}
    return {"type": "text", "text": block.text, **mark}


def _tool(tool: ClientTool) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    given = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": given}


def _tool_choice(request: MessagesPrompt) -> Any:
    choice = request.tool_choice
    if choice is None:
        return None
    if isinstance(choice, NamedToolChoice):
        return {"type": "function", "function": {"name": choice.name}}
    return CHOICES[choice.type]
