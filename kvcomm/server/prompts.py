"""From what a client sends to segments for the engine.

A conversation is rendered by the model's chat template and tokenized as one text, so requests that begin alike share
their KV exactly, whoever rendered them. Control tokens spelled out in messages or tools are ordinary text and cannot
end a turn; the template's own ones are real, and what its code looks for in answers, such as the end of thoughts, is
left to it there. A plain completion's text is taken as it is. Segments stand in front of either.

Where a request brings segments, in front or as parts of its messages, the texts of its messages other than system ones
are segments, too, by the rule of `kvcomm.engine.chat`: what differs from request to request is no part of the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Unpack

from kvcomm.engine.chat import TEXT, joined, pieces_of, placed_text, rendered_ids, segments_of
from kvcomm.engine.chat_template import ROLES, Message, Placed, Rendered, TemplateSettings
from kvcomm.engine.marks import Marks
from kvcomm.errors import TemplateError
from kvcomm.memory.segments import Segment
from kvcomm.server.errors import ApiError
from kvcomm.server.followed import FollowedAnswer
from kvcomm.server.json_text import JsonCaps, JsonRefused, read_json
from kvcomm.server.sampling import ttl_of
from kvcomm.server.schemas.cache import WarmRequest
from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.completions import CompletionRequest
from kvcomm.server.schemas.messages import AssistantMessage, TextPart, ToolCall, ToolMessage
from kvcomm.server.schemas.segments import MAX_SEGMENTS
from kvcomm.server.sections import Sections
from kvcomm.server.segments.prepared import PlacedSegment, PreparedPrompt
from kvcomm.server.segments.reading import PromptTail, SegmentReader, TextSource
from kvcomm.server.segments.registry import SegmentRegistries
from kvcomm.server.text_limit import TextLimit
from kvcomm.server.token_cache import Space, TokenCache
from kvcomm.toolcalls.reading import AnswerReaders
from kvcomm.toolcalls.template import ToolTemplate


class PromptMaker:
    """Renders and tokenizes for one engine. Safe to use from several threads."""

    def __init__(
        self,
        engine: TextSource,
        registries: SegmentRegistries,
        *,
        tool_parser: str | None = None,
        default_tools: bool = True,
    ) -> None:
        """`tool_parser`, `default_tools`: see `ServerSettings`."""
        self._engine = engine
        self._encoder = engine.encoder
        self.template = ToolTemplate(engine.tokenizer, tool_parser)
        self.readers = AnswerReaders(engine.tokenizer, self.template)
        self._has_default_tools = default_tools
        self._sections = Sections(engine.encoder)
        self.texts = TokenCache()
        self._limit = TextLimit(engine.tokenizer, engine.max_context)
        self.segments = SegmentReader(engine, registries, self._limit)
        self._special_ids = frozenset(engine.tokenizer.all_special_ids)

    def chat(self, request: ChatRequest, tenant: str, sources: Sequence[FollowedAnswer] = ()) -> PreparedPrompt:
        """The prompt of a conversation, up to where the assistant speaks.

        Args:
            tenant: whose named segments are meant.
            sources: answers that its segments follow, see `SegmentReader.prepare`.

        Raises:
            ApiError: 400 when the model has no chat template, or the template rejects the conversation; and what
                `SegmentReader.prepare` raises.
            InvalidRequest: it cannot be tokenized.
        """
        marks = self.marks()
        for message in request.messages:
            if message.role != "assistant":  # of an answer, templates may leave out what was thought
                self._require_short(message.content)
        messages = self.read(marks, request.messages, apart=bool(request.segments))
        tools, variables = marks.hide(shown_tools(request)), marks.hide(template_variables(request))
        if request.continue_final_message:
            rendered = self._render_open(marks, messages, tools=tools, variables=variables)
        else:
            rendered = self.render(marks, messages, tools=tools, variables=variables, speaks=request.speaks)
        self._limit.require(rendered.whole)
        space = (tenant, request.cache_salt)
        if not request.segments and not marks.slots:
            ids = rendered_ids(self._encoder, marks, rendered.text, partial(self._known_tokens, space))
            return PreparedPrompt(self._engine.read_prompt([Segment(ids)], is_start=True)).living(ttl_of(request))
        pieces = self.cut(marks, rendered.text, rendered.whole)
        if not request.segments:
            segments, placed = self._segments(marks, pieces, space)
            prompt = PreparedPrompt(self._engine.read_prompt(segments, is_start=True))
            num_own = sum(len(segment.token_ids) for segment in segments)
            return prompt.holding(placed, prompt.num_tokens - num_own).living(ttl_of(request))
        head = self._head(marks, pieces[0]) if pieces and isinstance(pieces[0], str) else ""
        if head:
            pieces[0] = pieces[0][len(head) :]  # type: ignore[index]  # a text, as was seen
        tail = PromptTail(head, None, *self._segments(marks, pieces, space))
        return self.segments.prepare(request.segments, request.boundary, tail, tenant, sources).living(ttl_of(request))

    def _require_short(self, content: str | Sequence[Any] | None) -> None:
        """Raises PromptTooLong for a message that alone cannot fit, before anything longer is made of it."""
        for part in (content,) if isinstance(content, str) else content or ():
            self._limit.require(part if isinstance(part, str) else part.text)

    def completion(
        self, prompt: str | list[int], request: CompletionRequest, tenant: str, sources: Sequence[FollowedAnswer] = ()
    ) -> PreparedPrompt:
        """One of the prompts of a plain completion; raises and takes as `chat`."""
        if isinstance(prompt, str):
            self._limit.require(prompt)
        if not request.segments:
            return PreparedPrompt(self._engine.read_prompt(prompt, is_start=True)).living(ttl_of(request))
        if isinstance(prompt, str):
            head = self._head(self.marks(), prompt)
            tail = PromptTail(head, TEXT, (Segment(self._tokens(prompt[len(head) :]), TEXT),))
        else:
            tail = PromptTail(segments=(Segment(tuple(prompt), TEXT),))
        return self.segments.prepare(request.segments, request.boundary, tail, tenant, sources).living(ttl_of(request))

    def warm(self, request: WarmRequest, tenant: str) -> PreparedPrompt:
        """Segments with nothing behind them; raises and takes as `chat`."""
        return self.segments.prepare(request.segments, request.boundary, PromptTail(), tenant)

    def text(self, text: str | list[int], *, is_start: bool) -> tuple[Segment, ...]:
        """Text or token ids as they are, for a context; `is_start`: nothing stands before it.

        Raises:
            InvalidRequest: no tokens, too many, or ids that the model does not know.
        """
        if isinstance(text, str):
            self._limit.require(text)
        return self._engine.read_prompt(text, is_start=is_start)

    def tokens(self, text: str, *, adds_start: bool) -> list[int]:
        """Token ids of a text as a plain completion takes it, see `TextEncoder.start`.

        Raises:
            PromptTooLong: it surely has more than the model takes.
        """
        self._limit.require(text)
        return list(self._encoder.start(text, adds_start=adds_start))

    def plain_ids(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """An answer as other prompts may hold it: without special tokens, as its text is told."""
        return tuple(token for token in token_ids if token not in self._special_ids)

    def marks(self, stem: str | None = None, hidden: Sequence[str] = ()) -> Marks[Placed]:
        """Stand-ins for control tokens of this model, new ones or those made before."""
        return Marks(self._encoder.control_pattern, stem, hidden, in_answers=self._encoder.answer_pattern)

    def read(self, marks: Marks[Placed], messages: Sequence[Any], *, apart: bool = False) -> list[Message]:
        """A request's messages as they are to be rendered.

        Args:
            apart: put texts apart from the template even if no part of a message is a segment.

        Raises:
            ApiError: 400 when too many parts are.
            InvalidRequest: they cannot fit, or the tokenizer cannot take a control token as ordinary text.
        """
        parts = (part for message in messages for part in _parts(message.content))
        texts = [part.text for part in parts if part.segment_name is not None]
        if len(texts) > MAX_SEGMENTS:
            told = f"messages have {len(texts)} parts that are segments; a request may have {MAX_SEGMENTS} at most"
            raise ApiError(400, "invalid_value", told, param="messages")
        self._limit.require("".join(texts))
        return [
            self._message(marks, message, f"messages[{index}].content", apart or bool(texts))
            for index, message in enumerate(messages)
        ]

    def _message(self, marks: Marks[Placed], message: Any, label: str, apart: bool) -> Message:
        fields = marks.hide(message_fields(message))
        if not apart:
            text = marks.hide_text(text_of(message.content), fields["role"])
            return Message(fields, (text,) if text else ())
        make = partial(placed_text, self._encoder, marks)
        if isinstance(message.content, str):
            return Message(fields, joined([make(message.content, fields["role"], None, label)]))
        parts = [
            make(part.text, fields["role"], part.segment_name, f"{label}[{index}]")
            for index, part in enumerate(_parts(message.content))
        ]
        return Message(fields, joined(parts))

    def encode(self, text: str, whole: str, marks: Marks[Placed], *, is_start: bool) -> tuple[Segment, ...]:
        """The segments of rendered text, control tokens that a client spelled out as ordinary text.

        Args:
            text, whole: as in `Rendered`, or the end of both.
            is_start: nothing stands before it.

        Raises:
            ApiError: 400 when the template does not leave a segment as it is.
            InvalidRequest: it has none, too many, or cannot be tokenized.
        """
        self._limit.require(whole)
        segments = segments_of(self._encoder, marks, self.cut(marks, text, whole))
        return self._engine.read_prompt(list(segments), is_start=is_start)

    def cut(self, marks: Marks[Placed], text: str, whole: str) -> list[str | Placed]:
        """See `pieces_of`; raises ApiError 400 where that raises TemplateError."""
        try:
            return pieces_of(marks, text, whole)
        except TemplateError as error:
            raise _rejected(error) from error

    def _segments(
        self, marks: Marks[Placed], pieces: Sequence[str | Placed], space: Space
    ) -> tuple[tuple[Segment, ...], tuple[PlacedSegment, ...]]:
        """The segments of pieces, and where among them the client's own ones are."""
        tokens = partial(self._known_tokens, space)
        segments = tuple(segments_of(self._encoder, marks, pieces, tokens))
        ends = accumulate(len(segment.token_ids) for segment in segments)
        placed = [
            PlacedSegment(piece.name, self.segments.digest(segment, space[0]), end - len(segment.token_ids), end)
            for piece, segment, end in zip(pieces, segments, ends, strict=True)
            if isinstance(piece, Placed) and piece.segment is not None
        ]
        return segments, tuple(placed)

    def _known_tokens(self, space: Space, text: str) -> tuple[int, ...]:
        """Tokens of text without hidden control tokens, from what is known of texts that this namespace has sent."""
        ids: list[int] = []
        for part in self._sections.of(text):
            ids += (part,) if isinstance(part, int) else self.texts.tokens(space, part, self._tokens)
        return tuple(ids)

    def _tokens(self, text: str) -> tuple[int, ...]:
        return self._engine.segment(text).token_ids

    def _head(self, marks: Marks[Any], text: str) -> str:
        """Text up to the first control token, real or spelled out: what may share a token with text before it."""
        head = marks.split(text)[0][0]
        pattern = self._encoder.control_pattern
        control = None if pattern is None else pattern.search(head)
        return head if control is None else head[: control.start()]

    def render(
        self,
        marks: Marks[Placed],
        messages: Sequence[Message],
        *,
        before: Sequence[dict[str, Any]] = (),
        **settings: Unpack[TemplateSettings],
    ) -> Rendered:
        """A conversation as the chat template writes it; see `ChatTemplate.render_parts`.

        Raises:
            ApiError: 400 when the model has no chat template, or the template rejects the conversation.
        """
        if not self.template.exists:
            message = "this model has no chat template; use /v1/completions with a prompt of your own"
            raise ApiError(400, "no_chat_template", message)
        self._require_place(messages, settings.get("tools"))
        try:
            rendered = self.template.render_parts(marks, messages, before=before, **settings)
            self.template.require_shown(rendered.messages, num_before=len(before), **settings)
        except TemplateError as error:
            raise _rejected(error) from error
        return rendered

    def _require_place(self, messages: Sequence[Message], tools: Any) -> None:
        """Raises ApiError 400 for tools that the model's own template has no place for, if it has to be that one."""
        if self._has_default_tools:
            return
        if tools and not self.template.shows_tools:
            message = "this model's chat template has no place for tools, and this server does not describe them itself"
            raise ApiError(400, "tools_not_supported", message, param="tools")
        if not self.template.shows_history and any(ToolTemplate.is_about_tools(each.fields) for each in messages):
            message = "this model's chat template shows no calls of tools, and this server does not write them itself"
            raise ApiError(400, "tools_not_supported", message, param="messages")

    def _render_open(
        self, marks: Marks[Placed], messages: Sequence[Message], *, tools: Any, variables: Mapping[str, Any]
    ) -> Rendered:
        """A conversation up to the end of what its last message says; raises as `render`."""
        last, end = messages[-1], marks.stand_in("")
        if last.fields.get("tool_calls"):
            raise ApiError(400, "invalid_value", "a message with tool_calls cannot be continued", param="messages")
        opened = [*messages[:-1], last._replace(parts=(*last.parts, end))]
        rendered = self.render(marks, opened, tools=tools, variables=variables, speaks=False)
        if end not in rendered.text:
            raise _rejected(TemplateError("the chat template drops the content of the last message"))
        return rendered._replace(text=rendered.text.rpartition(end)[0], whole=rendered.whole.rpartition(end)[0])


def _rejected(error: TemplateError) -> ApiError:
    return ApiError(400, "template_error", str(error), param="messages")


def shown_tools(request: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that the chat template is to show."""
    if not request.tools or request.tool_choice == "none":
        return None
    return [tool.model_dump(exclude_none=True, exclude={"cache_control"}) for tool in request.tools]


def template_variables(request: ChatRequest) -> dict[str, Any]:
    """What else the chat template may look at."""
    effort = {} if request.reasoning_effort is None else {"reasoning_effort": request.reasoning_effort}
    return {**effort, **(request.chat_template_kwargs or {})}


def message_fields(message: Any) -> dict[str, Any]:
    """A message as chat templates expect it, without its content."""
    fields: dict[str, Any] = {**message.others, "role": ROLES.get(message.role, message.role)}
    if getattr(message, "name", None) is not None:
        fields["name"] = message.name
    if isinstance(message, ToolMessage):
        fields["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        thought = message.reasoning_content or message.reasoning
        if thought:  # chat templates know it by either name
            fields |= {"reasoning_content": thought, "reasoning": thought}
        if message.tool_calls:
            fields["tool_calls"] = [_call_values(call) for call in message.tool_calls]
    return fields


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
    return content if isinstance(content, str) else "".join(part.text for part in _parts(content))


def _parts(content: str | list[TextPart] | None) -> Sequence[TextPart]:
    """The parts of a message's content, if it has such."""
    return () if content is None or isinstance(content, str) else content
