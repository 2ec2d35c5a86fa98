"""Neutral events of answers, drawn at random."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from kvcomm.toolcalls.events import (
    ArgumentsDelta,
    CallEnd,
    CallStart,
    Event,
    Finish,
    FinishReason,
    ReasoningDelta,
    TextDelta,
)

PIECES = st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4)
JSON_PIECES = st.sampled_from([["{}"], ['{"a', '": 1}'], ['{"city": "P', "aris 🗼", '"}'], ["{", "}"]])


def _texts(pieces: list[str]) -> list[Event]:
    return [TextDelta(piece) for piece in pieces]


def _thoughts(pieces: list[str]) -> list[Event]:
    return [ReasoningDelta(piece) for piece in pieces]


@st.composite
def answers(draw: st.DrawFn, *, arguments: st.SearchStrategy[list[str]] = JSON_PIECES) -> list[Event]:
    """The events of one answer: thoughts, texts and calls in any order."""
    events: list[Event] = []
    indices = itertools.count()
    for kind in draw(st.lists(st.sampled_from(["text", "thought", "call"]), max_size=5)):
        if kind == "call":
            index = next(indices)
            events.append(CallStart(index, f"call_{index}", draw(st.sampled_from(["f", "g"]))))
            events += [ArgumentsDelta(index, piece) for piece in draw(arguments)]
            events.append(CallEnd(index))
        else:
            events += (_texts if kind == "text" else _thoughts)(draw(PIECES))
    reasons: list[FinishReason] = ["stop", "length", "tool_calls"]
    return [*events, Finish(draw(st.sampled_from(reasons)))]


def runs(events: list[Event]) -> list[tuple[str, str]]:
    """What the events say: kinds and whole texts, in order; of calls `call NAME` and the arguments."""
    said: list[tuple[str, str]] = []
    for event in events:
        match event:
            case TextDelta(text):
                kind = "text"
            case ReasoningDelta(text):
                kind = "thought"
            case CallStart(_, _, name):
                said.append((f"call {name}", ""))
                continue
            case ArgumentsDelta(_, text):
                said[-1] = (said[-1][0], said[-1][1] + text)
                continue
            case _:
                continue
        if said and said[-1][0] == kind:
            said[-1] = (kind, said[-1][1] + text)
        else:
            said.append((kind, text))
    return said
