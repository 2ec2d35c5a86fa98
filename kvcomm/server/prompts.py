"""From what a client sends to segments for the engine.

A conversation is rendered by the model's chat template and tokenized as one text, so requests that begin alike share
their KV exactly, whoever rendered them. Control tokens spelled out in messages or tools are ordinary text and cannot
end a turn; the template's own ones are real, and what its code looks for in answers, such as the end of thoughts, is
left to it there. A plain completion's text is taken as it is. Segments stand in front of
either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from kvcomm.agents.rendering import PromptRenderer
from kvcomm.engine.engine import Engine
from kvcomm.memory.segments import Segment
from kvcomm.server.errors import ApiError
from kvcomm.server.json_text import JsonCaps, JsonRefused, read_json
from kvcomm.server.marks import Marks
from kvcomm.server.sampling import ttl_of
from kvcomm.server.schemas.cache import WarmRequest
from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.completions import CompletionRequest
from kvcomm.server.schemas.messages import AssistantMessage, TextPart, ToolCall, ToolMessage
from kvcomm.server.schemas.segments import SegmentedRequest
from kvcomm.server.sections import Sections
from kvcomm.server.segments.prepared import PreparedPrompt
from kvcomm.server.segments.reading import SegmentReader, Tail
from kvcomm.server.segments.registry import SegmentRegistries
from kvcomm.server.text_limit import TextLimit
from kvcomm.server.token_cache import Space, TokenCache

ROLES = {"developer": "system"}
"""Roles that chat templates know by an older name."""


class PromptMaker:
    """Renders and tokenizes for one engine. Safe to use from several threads."""

    def __init__(self, engine: Engine, registries: SegmentRegistries) -> None:
        self._engine = engine
        self._renderer = PromptRenderer(engine)
        self._sections = Sections(engine.encoder)
        self.texts = TokenCache()
        self._limit = TextLimit(engine.tokenizer, engine.max_context)
        self.segments = SegmentReader(engine, self._renderer, registries, self._limit)

    def chat(self, request: ChatRequest, tenant: str) -> PreparedPrompt:
        """The prompt of a conversation, up to where the assistant speaks.

        Args:
            tenant: whose named segments are meant.

        Raises:
            ApiError: 400 when the model has no chat template, or the template rejects the conversation; and what
                `SegmentReader.prepare` raises.
            InvalidRequest: it cannot be tokenized.
        """
        marks = self.marks()
        for message in request.messages:
            if message.role != "assistant":  # of an answer, templates may leave out what was thought
                self._require_short(message.content)
        messages = [message_values(message) for message in request.messages]
        text = self.render(marks.hide_messages(messages), marks.hide(shown_tools(request)), template_variables(request))
        return self._prepare(request, marks, text, tenant)

    def _require_short(self, content: str | Sequence[Any] | None) -> None:
        """Raises PromptTooLong for a message that alone cannot fit, before anything longer is made of it."""
        for part in (content,) if isinstance(content, str) else content or ():
            self._limit.require(part if isinstance(part, str) else part.text)

    def completion(self, prompt: str | list[int], request: CompletionRequest, tenant: str) -> PreparedPrompt:
        """One of the prompts of a plain completion; raises and takes as `chat`."""
        if isinstance(prompt, str):
            self._limit.require(prompt)
        if not request.segments:
            return PreparedPrompt(self._engine.read_prompt(prompt, is_start=True)).living(ttl_of(request))
        if isinstance(prompt, str):
            return self._prepare(request, Marks(), prompt, tenant)
        tail = Tail(token_ids=tuple(prompt))
        return self.segments.prepare(request.segments, request.boundary, tail, tenant).living(ttl_of(request))

    def warm(self, request: WarmRequest, tenant: str) -> PreparedPrompt:
        """Segments with nothing behind them; raises and takes as `chat`."""
        return self.segments.prepare(request.segments, request.boundary, Tail(), tenant)

    def text(self, text: str | list[int], *, is_start: bool) -> tuple[Segment, ...]:
        """Text or token ids as they are, for a context; `is_start`: nothing stands before it.

        Raises:
            InvalidRequest: no tokens, too many, or ids that the model does not know.
        """
        if isinstance(text, str):
            self._limit.require(text)
        return self._engine.read_prompt(text, is_start=is_start)

    def marks(self, stem: str | None = None, hidden: Sequence[str] = ()) -> Marks:
        """Stand-ins for control tokens of this model, new ones or those made before."""
        encoder = self._engine.encoder
        return Marks(encoder.control_pattern, stem, hidden, in_answers=encoder.answer_pattern)

    def encode(self, text: str, marks: Marks, *, is_start: bool) -> tuple[Segment, ...]:
        """The tokens of rendered text, control tokens that a client spelled out as ordinary text.

        Args:
            is_start: nothing stands before it.

        Raises:
            InvalidRequest: it has none, too many, or cannot be tokenized.
        """
        self._limit.require(text)
        return self._engine.read_prompt([Segment(self._encode(marks, text))], is_start=is_start)

    def _prepare(self, request: SegmentedRequest, marks: Marks, text: str, tenant: str) -> PreparedPrompt:
        """The prompt of rendered text, behind the request's segments if it brings any."""
        self._limit.require(text)
        if not request.segments:
            ids = self._encode_again(marks, text, (tenant, request.cache_salt))
            return PreparedPrompt(self._engine.read_prompt([Segment(ids)], is_start=True)).living(ttl_of(request))
        head = self._head(marks, text)
        tail = Tail(head, self._encode(marks, text[len(head) :]))
        return self.segments.prepare(request.segments, request.boundary, tail, tenant).living(ttl_of(request))

    def _encode(self, marks: Marks, text: str) -> tuple[int, ...]:
        ids: list[int] = []
        for piece, control in marks.split(text):
            ids += self._tokens(piece)
            if control is not None:
                ids += self._renderer.encode_input("messages", control)
        return tuple(ids)

    def _encode_again(self, marks: Marks, text: str, space: Space) -> tuple[int, ...]:
        """As `_encode`, from what is known of messages that this namespace has sent before."""
        if marks.hidden:
            return self._encode(marks, text)
        ids: list[int] = []
        for part in self._sections.of(text):
            ids += (part,) if isinstance(part, int) else self.texts.tokens(space, part, self._tokens)
        return tuple(ids)

    def _tokens(self, text: str) -> tuple[int, ...]:
        return self._engine.segment(text).token_ids

    def _head(self, marks: Marks, text: str) -> str:
        """Text up to the first control token, real or spelled out: what may share a token with text before it."""
        head = marks.split(text)[0][0]
        pattern = self._engine.encoder.control_pattern
        control = None if pattern is None else pattern.search(head)
        return head if control is None else head[: control.start()]

    def render(self, messages: Any, tools: Any, variables: Mapping[str, Any], *, speaks: bool = True) -> str:
        """A conversation as the chat template writes it; `speaks` puts the beginning of an answer behind it.

        Raises:
            ApiError: 400 when the model has no chat template, or the template rejects the conversation.
        """
        from jinja2 import TemplateError

        tokenizer = self._engine.tokenizer
        if not tokenizer.chat_template:
            message = "this model has no chat template; use /v1/completions with a prompt of your own"
            raise ApiError(400, "no_chat_template", message)
        try:
            text = tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=speaks, **variables
            )
        except TemplateError as error:
            message = f"the model's chat template rejects these messages: {error}"
            raise ApiError(400, "template_error", message, param="messages") from error
        return cast("str", text)


def shown_tools(request: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that the chat template is to show."""
    if not request.tools or request.tool_choice == "none":
        return None
    return [tool.model_dump(exclude_none=True) for tool in request.tools]


def template_variables(request: ChatRequest) -> dict[str, Any]:
    """What else the chat template may look at."""
    return {} if request.reasoning_effort is None else {"reasoning_effort": request.reasoning_effort}


def message_values(message: Any) -> dict[str, Any]:
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
    """A tool call; templates write its arguments as JSON themselves, so they get the object, unless it is too deep."""
    arguments: Any = call.function.arguments
    try:
        parsed = read_json(arguments.encode(), JsonCaps())
    except JsonRefused:  # the model wrote it, so it may be anything
        parsed = None
    values = parsed if isinstance(parsed, dict) else arguments
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": values}}


def text_of(content: str | list[TextPart] | None) -> str:
    """A message's text."""
    if content is None:
        return ""
    return content if isinstance(content, str) else "".join(part.text for part in content)
