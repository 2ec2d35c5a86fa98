"""Conversations in contexts: how messages continue what a context already holds.

The chat template is rendered over all messages of the conversation, old and new, and what it writes must begin with
the text that the context holds. Only what follows is new; it is tokenized on its own. Answers that the context keeps
are the ids that were decoded, never rendered again: a stand-in holds their place in the template. What is kept between
requests is a conversation's JSON text and nothing else, so that what it takes in memory is what quotas count.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from kvcomm.errors import SnapshotCorrupt
from kvcomm.memory.segments import Segment
from kvcomm.server.errors import ApiError
from kvcomm.server.prompts import PromptMaker

NOT_CONTINUED = "context_not_continued"
"""Code of the error where the template writes what a context holds differently once there is more."""


class Conversation(BaseModel):
    """The messages of a context, and the text that stands for them.

    Attributes:
        messages, tools, variables: what the chat template has seen; control tokens, segments and answers are stand-ins.
        rendered: what it wrote, to the context's end.
        stem, hidden: of the stand-ins; see `Marks`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = {}
    rendered: str = ""
    stem: str | None = None
    hidden: list[str] = []


class KeptConversation:
    """A conversation between requests. Never changes, so that forks share it."""

    __slots__ = ("_text",)

    def __init__(self, conversation: Conversation) -> None:
        # Not pydantic's JSON: arguments of tool calls may hold NaN and lone surrogates, and come back as they were.
        text = json.dumps(conversation.model_dump(), ensure_ascii=False, separators=(",", ":"))
        self._text = text.encode("utf-8", "surrogatepass")

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return len(self._text)

    def read(self) -> Conversation:
        """The conversation; takes time like its length."""
        return Conversation.model_validate(json.loads(self._text.decode("utf-8", "surrogatepass")))

    def note(self) -> str:
        """For a snapshot: ASCII."""
        return json.dumps(json.loads(self._text.decode("utf-8", "surrogatepass")))

    @classmethod
    def from_note(cls, note: str | None) -> KeptConversation | None:
        """What a snapshot's note says; None: it says nothing.

        Raises:
            SnapshotCorrupt: it says something else.
        """
        try:
            return None if note is None else cls(Conversation.model_validate(json.loads(note)))
        except ValidationError as error:
            raise SnapshotCorrupt(f"the snapshot's note is no conversation: {error.errors()[0]['msg']}") from error
        except (ValueError, RecursionError) as error:
            raise SnapshotCorrupt(f"the snapshot's note is no conversation: {error}") from error


class Continued(NamedTuple):
    """What is new to a context, and its conversation with that; None: it holds text that no template wrote."""

    prompt: tuple[Segment, ...]
    conversation: KeptConversation | None


def continue_conversation(
    maker: PromptMaker,
    before: Conversation | None,
    messages: Sequence[Any],
    *,
    tools: list[dict[str, Any]] | None,
    variables: dict[str, Any] | None = None,
    speaks: bool,
    is_start: bool,
) -> Continued:
    """Messages behind a context.

    Args:
        before: what the context holds; None: no conversation, so the messages are one of their own behind it.
        tools: None: those that were there.
        speaks: an answer will follow, and be the conversation's last message.
        is_start: the context is empty.

    Raises:
        ApiError: 400 when the template writes what the context holds differently once there is more.
        InvalidRequest: nothing is new.
    """
    before = before or Conversation()
    marks = maker.marks(before.stem, before.hidden)
    shown = before.tools if tools is None else marks.hide(tools)
    given = {**before.variables, **marks.hide(variables or {})}
    rendered = maker.render(
        marks, maker.read(marks, messages), before=before.messages, tools=shown, variables=given, speaks=speaks
    )
    if not all(text.startswith(before.rendered) for text in (rendered.text, rendered.whole)):
        raise ApiError(
            400,
            NOT_CONTINUED,
            "with these messages, tools and settings the model's chat template writes the context's own messages "
            "differently; leave tools and settings as they were, or send all messages without context_id",
            param="messages",
        )
    num_before = len(before.rendered)
    prompt = maker.encode(rendered.text[num_before:], rendered.whole[num_before:], marks, is_start=is_start)
    shown_messages, text = list(rendered.messages), rendered.text
    if speaks:
        answer = marks.stand_in("")
        shown_messages.append({"role": "assistant", "content": answer})
        text += answer
    after = Conversation(
        messages=shown_messages, tools=shown, variables=given, rendered=text, stem=marks.stem, hidden=list(marks.hidden)
    )
    return Continued(prompt, KeptConversation(after))
