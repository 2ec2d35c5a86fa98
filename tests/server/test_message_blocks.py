"""Blocks and events of messages: the official client puts a stream together, and gets what the whole answer is."""

from __future__ import annotations

from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from kvcomm.server.anthropic.output import Blocks, arguments_of
from kvcomm.toolcalls.events import Event
from tests.server.answer_events import answers, runs

OFFICIAL: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
BEGUN = {
    "type": "message_start",
    "message": {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 0},
    },
}


def put_together(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks that the official client makes of a stream."""
    snapshot, buffers = None, dict[int, bytes]()
    for each in [BEGUN, *told]:
        event = OFFICIAL.validate_python(each)
        snapshot = accumulate_event(event=event, current_snapshot=snapshot, json_bufs=buffers)
    assert snapshot is not None
    return [block.to_dict() for block in snapshot.content]


def same(block: dict[str, Any]) -> dict[str, Any]:
    """What counts of a block."""
    return {name: value for name, value in block.items() if value is not None and name in SHOWN}


SHOWN = ("type", "text", "thinking", "signature", "id", "name", "input")


@given(events=answers(), cuts=st.lists(st.integers(0, 4)))
def test_a_stream_is_put_together_as_the_whole(events: list[Event], cuts: list[int]) -> None:
    blocks, told, left = Blocks(), list[dict[str, Any]](), list(events)
    for cut in [*cuts, len(events)]:
        told += list(blocks.feed(left[:cut]))
        left = left[cut:]
    made = [block.model_dump() for block in blocks.done]
    assert [same(each) for each in put_together(told)] == [same(each) for each in made]
    texts = []
    for block in made:
        kind = {"text": "text", "thinking": "thought"}.get(block["type"], f"call {block.get('name')}")
        texts.append((kind, block.get("text", block.get("thinking", block.get("input")))))
    assert texts == [(kind, arguments_of(text) if kind.startswith("call") else text) for kind, text in runs(events)]
    starts = [each["index"] for each in told if each["type"] == "content_block_start"]
    stops = [each["index"] for each in told if each["type"] == "content_block_stop"]
    assert starts == stops == list(range(len(made)))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ('{"a": 1}', {"a": 1}),
        ('{"a": [1, 2', {"a": [1, 2]}),
        ('{"city": "Par', {}),
        ("[1]", {"INVALID_JSON": "[1]"}),
        ("{a: 1}", {"INVALID_JSON": "{a: 1}"}),
        ('{"a": NaN}', {"INVALID_JSON": '{"a": NaN}'}),
        ("{" * 3000, None),
        ("9" * 5000, None),
    ],
)
def test_arguments_that_are_cut_or_wrong(text: str, values: dict[str, Any] | None) -> None:
    assert arguments_of(text) == ({"INVALID_JSON": text} if values is None else values)
