"""A model's chat template, and what stands in messages for it: it is asked, never imitated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypedDict, Unpack, cast

from kvcomm.engine.marks import Marks
from kvcomm.errors import TemplateError
from kvcomm.memory.segments import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {"developer": "system"}
"""Roles that chat templates know by an older name."""

PROBE = "kvcommprobe"
"""A word that no chat template writes by itself."""

PROBED_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": f"{PROBE}name",
        "description": PROBE,
        "parameters": {
            "type": "object",
            "properties": {f"{PROBE}key": {"type": "string", "description": PROBE}},
            "required": [f"{PROBE}key"],
        },
    },
}
RESERVED = frozenset(
    {
        "self",
        "conversation",
        "conversations",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)
"""Names that mean something else to transformers than a variable of the chat template."""


@dataclass(frozen=True)
class Static:
    """Text that is the same in every prompt of its kind: it is a part of the template."""

    text: str


Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""Dicts with "role", "content", and what else a chat template looks at; see `Engine.chat_prompt`."""


@dataclass(frozen=True)
class Placed:
    """A text in a message that becomes a segment of its own.

    Attributes:
        label: what errors call it.
        shown: the text with control tokens hidden.
        name: of its segment.
        segment: ready made, to be taken as it is or not at all; None: the turn's own text, which the chat template may
            trim or shorten.
    """

    label: str
    shown: str
    name: str
    segment: Segment | None = None


class Message(NamedTuple):
    """A message as it will be rendered.

    Attributes:
        fields: all but the content, control tokens hidden.
        parts: of its content; strings are static text with control tokens hidden.
    """

    fields: Mapping[str, Any]
    parts: tuple[str | Placed, ...]

    def with_marks(self, marks: Marks[Placed]) -> dict[str, Any]:
        """For the chat template, with stand-ins for what is placed."""
        return self._with("".join(part if isinstance(part, str) else marks.open(part) for part in self.parts))

    def with_texts(self) -> dict[str, Any]:
        """The same with the texts themselves."""
        return self._with("".join(part if isinstance(part, str) else part.shown for part in self.parts))

    def _with(self, content: str) -> dict[str, Any]:
        return {"role": self.fields["role"], "content": content, **self.fields}


class Rendered(NamedTuple):
    """What a chat template writes.

    Attributes:
        text: with stand-ins for what is placed.
        whole: with the texts themselves; control tokens are hidden in both.
        messages: as the template saw them for `text`.
    """

    text: str
    whole: str
    messages: list[dict[str, Any]]


class TemplateSettings(TypedDict, total=False):
    """What a chat template is given beside messages; see `ChatTemplate.render`."""

    tools: Any
    variables: Mapping[str, Any] | None
    speaks: bool


class ChatTemplate:
    """The chat template of a model. Safe to use from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @property
    def exists(self) -> bool:
        """Whether the model has one."""
        return bool(self._tokenizer.chat_template)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Any = None,
        variables: Mapping[str, Any] | None = None,
        speaks: bool = True,
    ) -> str:
        """A conversation as the template writes it; `speaks` puts the beginning of an answer behind it.

        Raises:
            TemplateError: the template rejects the conversation, or fails on it; the cause is its own error.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=speaks, **(variables or {})
            )
        except Exception as error:  # a template computes with whatever messages and variables hold
            raise TemplateError(f"the model's chat template rejects these messages: {error}") from error
        return cast("str", text)

    def render_parts(
        self,
        marks: Marks[Placed],
        messages: Sequence[Message],
        *,
        before: Sequence[dict[str, Any]] = (),
        **settings: Unpack[TemplateSettings],
    ) -> Rendered:
        """Messages behind those of `before`, which are as the template saw them then; takes and raises as `render`."""
        marked = [*before, *(message.with_marks(marks) for message in messages)]
        text = whole = self.render(marked, **settings)
        if marks.slots:
            whole = self.render([*before, *(message.with_texts() for message in messages)], **settings)
        return Rendered(text, whole, marked)

    @property
    def takes_system(self) -> bool:
        """Whether the template neither refuses nor silently drops a system message."""
        return self._probed is not None and "SYSTEMTEXT" in self._probed

    @property
    def drops_system(self) -> bool:
        """Whether it does the latter."""
        return self._probed is not None and "SYSTEMTEXT" not in self._probed

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the template has a place for tools: others drop them silently."""
        try:
            written = ChatTemplate.render(self, [{"role": "user", "content": "hello"}], tools=[PROBED_TOOL])
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):  # code of the template's own
            return False
        return PROBE in written

    @cached_property
    def _probed(self) -> str | None:
        try:
            return self.render([{"role": "system", "content": "SYSTEMTEXT"}, {"role": "user", "content": "USERTEXT"}])
        except TemplateError:
            return None
