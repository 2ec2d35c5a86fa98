"""From the neutral events of an answer to the blocks of a message and the events of its stream.

Whole and streamed messages are made by the same object, so that they cannot differ. Always holds: at most one block is
open, the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic_core import from_json

from kvcomm.server.schemas.anthropic_answers import AnswerBlock, AnswerText, AnswerThinking, AnswerToolUse, StopReason
from kvcomm.toolcalls.events import ArgumentsDelta, CallEnd, CallStart, Event, Finish, ReasoningDelta, TextDelta

EventFields = dict[str, Any]
"""An event of a stream."""

STOP_REASONS: dict[str, StopReason] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Blocks:
    """The blocks of one message, as they come.

    Attributes:
        done: those that are complete.
        finish_reason: of the answer, once it has ended.
    """

    def __init__(self) -> None:
        self.done: list[AnswerBlock] = []
        self.finish_reason: str | None = None
        self._open: AnswerBlock | None = None
        self._texts: list[str] = []

    def feed(self, events: Sequence[Event]) -> Iterator[EventFields]:
        """Take what has come, and say it as the events of a stream."""
        for event in events:
            match event:
                case TextDelta(text):
                    yield from self._more(AnswerText(text=""), {"type": "text_delta", "text": text}, text)
                case ReasoningDelta(text):
                    yield from self._more(
                        AnswerThinking(thinking=""), {"type": "thinking_delta", "thinking": text}, text
                    )
                case CallStart(_, call_id, name):
                    yield from self._begin(AnswerToolUse(id=call_id, name=name, input={}))
                case ArgumentsDelta(_, text):
                    assert isinstance(self._open, AnswerToolUse), "arguments without a call"
                    yield self._delta({"type": "input_json_delta", "partial_json": text}, text)
                case CallEnd():
                    yield from self._end()
                case Finish(reason):
                    self.finish_reason = reason
                    yield from self._end()

    def _more(self, begun: AnswerBlock, delta: dict[str, str], text: str) -> Iterator[EventFields]:
        if self._open is None or self._open.type != begun.type:
            yield from self._begin(begun)
        yield self._delta(delta, text)

    def _begin(self, block: AnswerBlock) -> Iterator[EventFields]:
        yield from self._end()
        self._open = block
        yield {"type": "content_block_start", "index": len(self.done), "content_block": block.model_dump()}

    def _delta(self, delta: dict[str, str], text: str) -> EventFields:
        self._texts.append(text)
        return {"type": "content_block_delta", "index": len(self.done), "delta": delta}

    def _end(self) -> Iterator[EventFields]:
        if self._open is None:
            return
        yield {"type": "content_block_stop", "index": len(self.done)}
        self.done.append(_filled(self._open, "".join(self._texts)))
        self._open, self._texts = None, []


def _filled(block: AnswerBlock, text: str) -> AnswerBlock:
    if isinstance(block, AnswerText):
        return AnswerText(text=text)
    if isinstance(block, AnswerThinking):
        return AnswerThinking(thinking=text)
    return block.model_copy(update={"input": arguments_of(text)})


def arguments_of(text: str) -> dict[str, Any]:
    """A call's arguments: of a text that is cut, what is there, as Anthropic's client reads it while it streams."""
    try:
        values = from_json(text or "{}", allow_partial=True, allow_inf_nan=False)
    except ValueError:
        values = None
    return values if isinstance(values, dict) else {"INVALID_JSON": text}
