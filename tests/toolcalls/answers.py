"""Answers to be read by tests: how texts are cut, and what models write in each format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import count, pairwise
from typing import Any

from kvcomm.toolcalls.events import Answer, Event, collected
from kvcomm.toolcalls.formats import FORMATS
from kvcomm.toolcalls.reader import AnswerReader, ReasoningTags
from kvcomm.toolcalls.writer import AnswerWriter

THINK = ReasoningTags("<think>", "</think>")
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "search", "parameters": {"properties": {"query": {}, "top": {}}}}},
    {"type": "function", "function": {"name": "now"}},
]


def numbered() -> Callable[[], str]:
    """Ids that are the same in every run."""
    numbers = count()
    return lambda: f"id{next(numbers)}"


def make_reader(name: str, **settings: Any) -> AnswerReader:
    """A reader of one answer in a format."""
    writer = AnswerWriter(numbered())
    return AnswerReader(writer, FORMATS[name].make(writer, TOOLS), **settings)


def cut(text: str, cuts: Iterable[int]) -> Iterator[str]:
    """The text in pieces."""
    places = sorted({0, len(text), *(each % (len(text) + 1) for each in cuts)})
    return (text[start:end] for start, end in pairwise(places))


def events_of(name: str, pieces: Iterable[str], reason: str = "stop", **settings: Any) -> list[Event]:
    """All events of an answer that comes in these pieces."""
    reader = make_reader(name, **settings)
    events = [event for piece in pieces for event in reader.read(piece)]
    return [*events, *reader.finish(reason)]


def read(name: str, pieces: Iterable[str], reason: str = "stop", **settings: Any) -> Answer:
    """The answer that comes in these pieces."""
    return collected(events_of(name, pieces, reason, **settings))


def calls_of(answer: Answer) -> list[tuple[str, Any]]:
    """Names and arguments as values."""
    return [(call.name, json.loads(call.arguments)) for call in answer.calls]
