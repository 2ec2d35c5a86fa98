"""What an answer holds, as it comes: text, reasoning, and calls of tools; every API surface is made from these.

The order is that of the answer. A call's events are its start, its arguments in pieces, its end; calls do not overlap,
and their indices count from 0. The last event of an answer is its `Finish`. Joined, the events of a streamed answer are
the whole one: `collected`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer's text; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thinks before it answers; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; `id` is unique."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of the JSON text of a call's arguments; never empty."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call is complete, or the answer ends in it."""

    index: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The answer ends: by itself, at a limit, or in order to get the results of its calls."""

    reason: FinishReason


Event: TypeAlias = TextDelta | ReasoningDelta | CallStart | ArgumentsDelta | CallEnd | Finish


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool; `arguments` is JSON text as the model wrote it, which may be cut or wrong."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; texts are empty where there are none."""

    text: str
    reasoning: str
    calls: tuple[Call, ...]
    finish_reason: FinishReason


def collected(events: Iterable[Event]) -> Answer:
    """The answer that these are all the events of."""
    text, reasoning = list[str](), list[str]()
    starts, arguments = list[CallStart](), list[list[str]]()
    reason: FinishReason = "stop"
    for event in events:
        match event:
            case TextDelta(piece):
                text.append(piece)
            case ReasoningDelta(piece):
                reasoning.append(piece)
            case CallStart():
                starts.append(event)
                arguments.append([])
            case ArgumentsDelta(index, piece):
                arguments[index].append(piece)
            case Finish(reason):
                pass
            case CallEnd():
                pass
    calls = tuple(Call(start.id, start.name, "".join(each)) for start, each in zip(starts, arguments, strict=True))
    return Answer("".join(text), "".join(reasoning), calls, reason)
