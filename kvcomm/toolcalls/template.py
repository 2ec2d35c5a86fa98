"""A chat template that shows tools, calls and their results, whether it has a place for them or not.

What the model's own template can show is found out by letting it render a conversation with a tool. Where it has no
place for tools, these are described in the system message (in the first user message, where the template takes no
system message either); where it drops calls or their results, calls are written into the assistant's own text and
results into user messages. So nothing that a client sends is dropped: it is shown, or refused by name.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from kvcomm.engine.chat_template import PROBE, PROBED_TOOL, ChatTemplate
from kvcomm.errors import TemplateError
from kvcomm.toolcalls.formats import FORMATS, HERMES, MISTRAL, TRIGGERS, CallSyntax, Format, format_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALLED, GIVEN = f"{PROBE}called", f"{PROBE}given"
"""What probed calls call and give: no words of the probed tool, which a template may show without its calls."""

PROBE_ID = "kvcommpr1"
"""Nine letters and digits, as Mistral's templates insist on."""

INSTRUCTIONS = """\
You can call the tools that are described here, each by a JSON object:
<tools>
{tools}
</tools>
To call one, write its name and its arguments, which have to follow its schema, in this form:
{example}
The result comes back between <tool_response> and </tool_response>."""

_MISTRAL_ID = re.compile(r"[a-zA-Z0-9]{9}")

Messages = Sequence[Mapping[str, Any]]


class ToolTemplate(ChatTemplate):
    """The chat template of a model with a place for tools. Safe to use from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, parser: str | None = None) -> None:
        """`parser`: a name in `FORMATS`; None: as the template writes calls."""
        super().__init__(tokenizer)
        self._parser = parser
        self._own: Mapping[str, Any] | None = getattr(tokenizer, "response_template", None)

    @cached_property
    def format(self) -> Format:
        """How the model writes calls; Hermes' way where nobody knows."""
        return FORMATS[self._parser] if self._parser is not None else self._shown_format or HERMES

    @property
    def response_template(self) -> Mapping[str, Any] | None:
        """How transformers reads the model's answers, where the checkpoint or the format says it."""
        return self._own if self._own is not None and self._parser is None else self.format.declared

    @cached_property
    def shape(self) -> CallSyntax | None:
        """How calls look to the letter; None: nobody knows."""
        shown = self._shown_shape() if self._shown_format is self.format or self.response_template else None
        return self.format.shape if shown is None and self.response_template is None else shown

    @cached_property
    def is_known(self) -> bool:
        """Whether somebody knows how the model writes calls: its template shows it, or it was said."""
        return self._parser is not None or self.response_template is not None or self._shown_format is not None

    @cached_property
    def _shown_format(self) -> Format | None:
        written = self._written(1)
        return None if written is None else format_of(written)

    @property
    def shows_history(self) -> bool:
        """Whether it shows calls and their results in a conversation."""
        return self._calls is not None

    def render(self, messages: Messages, *, tools: Any = None, **settings: Any) -> str:
        """As `ChatTemplate.render`; tools, calls and results are shown in any case."""
        shown = [dict(message) for message in messages]
        if self._has_history(shown):
            shown = self._with_history(shown)
        if tools and not self.shows_tools:
            shown, tools = self._with_tools(shown, tools), None
        return super().render(shown, tools=tools, **settings)

    def require_shown(self, messages: Messages, *, tools: Any = None, num_before: int = 0, **settings: Any) -> None:
        """Make sure that nothing about calls is dropped in this very conversation.

        Args:
            num_before: messages in front that have been shown before; errors count from there.

        Raises:
            TemplateError: the template rejects the conversation, or shows a call or a result in none of its words;
                names it.
        """
        if not self._has_history(messages):
            return
        marked, places = _marked(messages)
        written = self.render(marked, tools=tools, **settings)
        for mark, (index, what) in places.items():
            if index >= num_before and mark not in written:
                raise TemplateError(f"messages[{index - num_before}].{what}: the model's chat template drops it")

    @staticmethod
    def is_about_tools(message: Mapping[str, Any]) -> bool:
        """Whether a message holds calls, or the result of one."""
        return message["role"] == "tool" or bool(message.get("tool_calls"))

    def _has_history(self, messages: Messages) -> bool:
        return any(map(self.is_about_tools, messages))

    def _with_history(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self._calls is None:
            return self._written_out(messages)
        for message in messages:
            if self._calls == "text" and message.get("tool_calls"):
                message["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
            if self.format is MISTRAL:
                _shorten_ids(message)
        return messages

    def _written_out(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Calls in the assistant's text, results in user messages; what then is the user's is one message."""
        shown: list[dict[str, Any]] = []
        for message in messages:
            calls = message.pop("tool_calls", None)
            if calls:
                functions = [call["function"] for call in calls]
                written = self.format.written([(each["name"], each["arguments"]) for each in functions])
                message["content"] = "\n".join(filter(None, (message["content"], written)))
            is_result = message["role"] == "tool"
            if is_result:
                message = {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
            was_result = bool(shown) and shown[-1].get("is_result", False)
            if message["role"] == "user" and was_result:
                message = {"role": "user", "content": f"{shown.pop()['content']}\n{message['content']}"}
            shown.append({**message, "is_result": True} if is_result else message)
        for message in shown:
            message.pop("is_result", None)
        return shown

    def _with_tools(self, messages: list[dict[str, Any]], tools: Any) -> list[dict[str, Any]]:
        example = self.format.written([("NAME", {"ARGUMENT": "VALUE"})])
        described = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = INSTRUCTIONS.format(tools=described, example=example)
        role = "system" if self.takes_system else "user"
        at = next((index for index, each in enumerate(messages) if each["role"] == role), None)
        if at is None or (role == "system" and at > 0):
            return [{"role": role, "content": text}, *messages]
        own = messages[at]["content"]
        both = (own, text) if role == "system" else (text, own)
        messages[at]["content"] = "\n\n".join(filter(None, both))
        return messages

    @cached_property
    def _calls(self) -> Literal["object", "text"] | None:
        """How the model's own template wants arguments; None: it does not show calls and results."""
        kinds: tuple[Literal["object", "text"], ...] = ("object", "text")
        for kind in kinds:
            written = self._try(_conversation(1, kind), tools=[PROBED_TOOL]) or ""
            is_repr = f"'{GIVEN}'" in written  # an object where a text was wanted
            if not is_repr and all(each in written for each in (CALLED, f"{PROBE}value", f"{PROBE}result")):
                return kind
        return None

    def _try(self, messages: list[dict[str, Any]], *, tools: Any = None, speaks: bool = False) -> str | None:
        """What the model's own template writes; None: it rejects that."""
        try:
            return super().render(messages, tools=tools, speaks=speaks)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):  # code of the template's own
            return None

    def _written(self, num_calls: int) -> str | None:
        """What the template writes for an answer that is nothing but calls, its end included; None: it cannot."""
        if self._calls is None:
            return None
        tools = [PROBED_TOOL]
        conversation = _conversation(num_calls, self._calls)[:2]
        before = self._try(conversation[:1], tools=tools, speaks=True)
        whole = self._try(conversation, tools=tools)
        if before is None or whole is None:
            return None
        answer = _behind(before, whole)
        for trigger in TRIGGERS:  # what templates write before it, such as empty reasoning, is no part of calls
            if trigger in answer:
                return answer[answer.index(trigger) :]
        return answer if whole.startswith(before) else None

    def _shown_shape(self) -> CallSyntax | None:
        one, two, plain = self._written(1), self._written(2), self._plain_end()
        if one is None or plain is None or not one.endswith(plain):
            return None
        parts = _cut(one.removesuffix(plain), 1)
        if parts is None:
            return None
        begin, middle, end = parts
        parts = _cut(two.removesuffix(plain), 2) if two is not None and two.endswith(plain) else None
        between = parts[2] if parts is not None and (parts[0], parts[1], parts[4]) == (begin, middle, end) else None
        found = CallSyntax(begin, middle, between, end)
        return None if PROBE in repr(found) else found  # ids are for the server to make

    def _plain_end(self) -> str | None:
        """What stands behind an answer."""
        written = self._try([{"role": "user", "content": "hello"}, {"role": "assistant", "content": PROBE}])
        return None if written is None else written.rpartition(PROBE)[2]


def _conversation(num_calls: int, arguments: str) -> list[dict[str, Any]]:
    values = {GIVEN: f"{PROBE}value"}
    function = {"name": CALLED, "arguments": values if arguments == "object" else json.dumps(values)}
    calls = [{"id": PROBE_ID, "type": "function", "function": function}] * num_calls
    return [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": PROBE_ID, "content": f"{PROBE}result"},
    ]


def _behind(before: str, whole: str) -> str:
    """What is left of a text where it is not any more what another one is."""
    num_common = next((at for at, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1]), None)
    return whole[min(len(before), len(whole)) if num_common is None else num_common :]


def _cut(written: str, num_calls: int) -> list[str] | None:
    """What stands around the names and arguments of probed calls; None: the arguments are no JSON."""
    arguments = r'\{\s*"' + GIVEN + r'"\s*:\s*"' + f"{PROBE}value" + r'"\s*\}'
    parts = re.split(f"{CALLED}|{arguments}", written)
    return parts if len(parts) == 2 * num_calls + 1 else None


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}


def _shorten_ids(message: dict[str, Any]) -> None:
    """Ids that others made, in the form that the template takes."""
    if message.get("tool_calls"):
        message["tool_calls"] = [{**call, "id": _short_id(call["id"])} for call in message["tool_calls"]]
    if "tool_call_id" in message:
        message["tool_call_id"] = _short_id(message["tool_call_id"])


def _short_id(call_id: str) -> str:
    return call_id if _MISTRAL_ID.fullmatch(call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _marked(messages: Messages) -> tuple[list[dict[str, Any]], dict[str, tuple[int, str]]]:
    """Messages with a mark for the name of every call and the text of every result, and where each mark is."""
    places: dict[str, tuple[int, str]] = {}
    stem = f"{PROBE}{secrets.token_hex(8)}n"

    def mark(index: int, what: str) -> str:
        made = f"{stem}{len(places)}x"
        places[made] = (index, what)
        return made

    marked = []
    for index, message in enumerate(messages):
        shown = dict(message)
        if shown["role"] == "tool":
            shown["content"] = mark(index, "content")
        if shown.get("tool_calls"):
            shown["tool_calls"] = [
                {**call, "function": {**call["function"], "name": mark(index, f"tool_calls[{at}]")}}
                for at, call in enumerate(shown["tool_calls"])
            ]
        marked.append(shown)
    return marked, places
