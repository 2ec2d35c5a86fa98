"""From the neutral events of an answer to the items of a response and the events of its stream.

Whole and streamed responses are made by the same object, so that they cannot differ. Always holds: at most one item is
open, the last one; what is told about an item comes between its `added` and its `done`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from kvcomm.server.schemas.chat import ChatTokenLogprob
from kvcomm.server.schemas.response_items import (
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputReasoningText,
    OutputText,
    ResponseStatus,
)
from kvcomm.toolcalls.events import ArgumentsDelta, CallEnd, CallStart, Event, Finish, ReasoningDelta, TextDelta

EventFields = dict[str, Any]
"""An event of a stream, without its number."""


class _Kind(NamedTuple):
    """A kind of items that consist of text: how their ids and their events begin."""

    prefix: str
    event: str


MESSAGE = _Kind("msg", "response.output_text")
REASONING = _Kind("rs", "response.reasoning_text")


class Output:
    """The items of one response, as they come.

    Attributes:
        items: those that are done.
        finish_reason: of the answer, once it has ended.
    """

    def __init__(self) -> None:
        self.items: list[OutputItem] = []
        self.finish_reason: str | None = None
        self._open: _Texts | _Call | None = None
        self._untold: list[ChatTokenLogprob] = []

    def feed(self, events: Sequence[Event], logprobs: Sequence[ChatTokenLogprob] = ()) -> Iterator[EventFields]:
        """Take what has come, and say it as the events of a stream.

        Args:
            logprobs: of the tokens drawn since the last call; told with the text that they are of.
        """
        self._untold += logprobs
        for event in events:
            match event:
                case TextDelta(text):
                    yield from self._more(MESSAGE, text, self._untold)
                    self._untold = []
                case ReasoningDelta(text):
                    self._untold = []  # of thoughts and calls none are told
                    yield from self._more(REASONING, text, [])
                case CallStart(_, call_id, name):
                    self._untold = []
                    yield from self._begin(_Call(call_id, name))
                case ArgumentsDelta(_, text):
                    assert isinstance(self._open, _Call), "arguments without a call"
                    self._untold = []
                    yield self._open.more(text)
                case CallEnd():
                    pass  # whether it is complete is known from what comes next
                case Finish(reason):
                    self.finish_reason = reason
                    yield from self._finish(reason)

    def _finish(self, reason: str) -> Iterator[EventFields]:
        if not self.items and self._open is None:
            yield from self._begin(_Texts(MESSAGE))  # an empty answer is an answer
        if isinstance(self._open, _Texts):
            self._open.add_logprobs(self._untold)  # of tokens that end it without a text of their own
        yield from self._close("incomplete" if reason == "length" else "completed")

    def _more(self, kind: _Kind, text: str, logprobs: list[ChatTokenLogprob]) -> Iterator[EventFields]:
        if not isinstance(self._open, _Texts) or self._open.kind is not kind:
            yield from self._begin(_Texts(kind))
        assert isinstance(self._open, _Texts)
        yield self._open.more(text, logprobs)

    def _begin(self, item: _Texts | _Call) -> Iterator[EventFields]:
        yield from self._close("completed")
        item.index = len(self.items)
        self._open = item
        yield from item.begin()

    def _close(self, status: ResponseStatus) -> Iterator[EventFields]:
        if self._open is not None:
            yield from self._open.end(status)
            self.items.append(self._open.item(status))
            self._open = None


class _Texts:
    """An item that consists of one text: a message, or what the model thinks."""

    def __init__(self, kind: _Kind) -> None:
        self.index = 0
        self.kind = kind
        self._id = f"{kind.prefix}_{uuid.uuid4().hex}"
        self._texts: list[str] = []
        self._logprobs: list[ChatTokenLogprob] = []

    def item(self, status: ResponseStatus) -> OutputItem:
        """As it is so far; empty while it is in progress."""
        is_begun = status == "in_progress"
        if self.kind is MESSAGE:
            return OutputMessage(id=self._id, status=status, content=[] if is_begun else [self._text()])
        return OutputReasoning(id=self._id, status=status, content=[] if is_begun else [self._thought()])

    def begin(self) -> Iterator[EventFields]:
        yield _item_event("added", self.index, self.item("in_progress"))
        yield self._event("response.content_part.added", part=self._part().model_dump())

    def add_logprobs(self, logprobs: Sequence[ChatTokenLogprob]) -> None:
        self._logprobs += logprobs

    def more(self, text: str, logprobs: Sequence[ChatTokenLogprob]) -> EventFields:
        self._texts.append(text)
        self._logprobs += logprobs
        told = {"logprobs": [each.model_dump() for each in logprobs]} if self.kind is MESSAGE else {}
        return self._event(f"{self.kind.event}.delta", delta=text, **told)

    def end(self, status: ResponseStatus) -> Iterator[EventFields]:
        part = self._part().model_dump()
        told = {"logprobs": part["logprobs"]} if self.kind is MESSAGE else {}
        yield self._event(f"{self.kind.event}.done", text=part["text"], **told)
        yield self._event("response.content_part.done", part=part)
        yield _item_event("done", self.index, self.item(status))

    def _part(self) -> OutputText | OutputReasoningText:
        return self._text() if self.kind is MESSAGE else self._thought()

    def _text(self) -> OutputText:
        return OutputText(text="".join(self._texts), logprobs=self._logprobs)

    def _thought(self) -> OutputReasoningText:
        return OutputReasoningText(text="".join(self._texts))

    def _event(self, kind: str, **told: Any) -> EventFields:
        return {"type": kind, "item_id": self._id, "output_index": self.index, "content_index": 0, **told}


class _Call:
    """An item that is a call."""

    def __init__(self, call_id: str, name: str) -> None:
        self.index = 0
        self._id = f"fc_{uuid.uuid4().hex}"
        self._call_id = call_id
        self._name = name
        self._arguments: list[str] = []

    def item(self, status: ResponseStatus) -> OutputCall:
        """As it is so far."""
        arguments = "".join(self._arguments)
        return OutputCall(id=self._id, status=status, call_id=self._call_id, name=self._name, arguments=arguments)

    def begin(self) -> Iterator[EventFields]:
        yield _item_event("added", self.index, self.item("in_progress"))

    def more(self, text: str) -> EventFields:
        self._arguments.append(text)
        return self._event("delta", delta=text)

    def end(self, status: ResponseStatus) -> Iterator[EventFields]:
        yield self._event("done", arguments="".join(self._arguments))
        yield _item_event("done", self.index, self.item(status))

    def _event(self, kind: str, **told: Any) -> EventFields:
        name = f"response.function_call_arguments.{kind}"
        return {"type": name, "item_id": self._id, "output_index": self.index, **told}


def _item_event(kind: str, index: int, item: OutputItem) -> EventFields:
    return {"type": f"response.output_item.{kind}", "output_index": index, "item": item.model_dump()}
