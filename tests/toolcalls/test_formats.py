"""Every format: what is written is read, however it is cut, and nothing of an answer is lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.toolcalls.events import ArgumentsDelta, CallEnd, CallStart, Finish, TextDelta
from kvcomm.toolcalls.formats import FORMATS
from tests.toolcalls.answers import THINK, calls_of, cut, events_of, make_reader, read

NAMES = ("hermes", "llama3_json", "mistral", "pythonic")
CUTS = st.lists(st.integers(min_value=0, max_value=10_000), max_size=12)

LETTERS = st.text(st.sampled_from("ab \n\"\\{}[](),:;'é漢🙂</tool_call>=|"), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | LETTERS | st.sampled_from([0.5, -1.25]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LETTERS, inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.sampled_from(["query", "top", "x_1"]), VALUES, max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(["search", "now"]), ARGUMENTS), min_size=1, max_size=3)

PIECES = (
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "<|python_tag|>",
    "<|python_start|>",
    "<|python_end|>",
    "<think>",
    "</think>",
    '{"name": "search", "arguments": {"query": "x"}}',
    '{"name": "now", "parameters": {}}',
    '"arguments": ',
    '{"name": "',
    "search",
    "search(",
    "query=",
    "[",
    "]",
    "{",
    "}",
    "(",
    ")",
    ",",
    '"',
    "'",
    "\\",
    " ",
    "\n",
    ";",
    "a",
    "🙂",
)
JUNK = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@pytest.mark.parametrize("name", NAMES)
@given(calls=CALLS, cuts=CUTS)
def test_what_is_written_is_read(name: str, calls: list[tuple[str, dict[str, Any]]], cuts: list[int]) -> None:
    text = FORMATS[name].written(calls)
    answer = read(name, cut(text, cuts))
    assert calls_of(answer) == calls
    assert (answer.text, answer.finish_reason) == ("", "tool_calls")


@pytest.mark.parametrize("name", NAMES)
@given(text=JUNK, cuts=CUTS, is_reasoning=st.booleans())
def test_how_an_answer_is_cut_changes_nothing(name: str, text: str, cuts: list[int], is_reasoning: bool) -> None:
    whole = make_reader(name, tags=THINK, is_reasoning=is_reasoning).whole(text, "stop")
    assert read(name, cut(text, cuts), tags=THINK, is_reasoning=is_reasoning) == whole
    assert read(name, text, tags=THINK, is_reasoning=is_reasoning) == whole


@pytest.mark.parametrize("name", NAMES)
@given(text=JUNK, cuts=CUTS)
def test_an_answer_without_calls_is_its_text(name: str, text: str, cuts: list[int]) -> None:
    answer = read(name, cut(text, cuts))
    if not answer.calls:
        assert answer.text == text


@pytest.mark.parametrize("name", NAMES)
@given(text=JUNK, cuts=CUTS)
def test_events_come_in_order(name: str, text: str, cuts: list[int]) -> None:
    open_call, num_calls = None, 0
    *events, last = events_of(name, cut(text, cuts), "length", tags=THINK)
    for event in events:
        match event:
            case CallStart(index):
                assert (open_call, index) == (None, num_calls)
                open_call, num_calls = index, num_calls + 1
            case ArgumentsDelta(index, piece):
                assert index == open_call
                assert piece
            case CallEnd(index):
                assert index == open_call
                open_call = None
            case Finish():
                raise AssertionError("an answer ends once")
            case _:
                assert event.text
                assert open_call is None
    assert open_call is None
    assert last == Finish("length")


@pytest.mark.parametrize("name", NAMES)
def test_cut_anywhere_a_call_is_there_or_its_beginning_is(name: str) -> None:
    calls = [("search", {"query": 'a "b" }</tool_call> 🙂', "top": [1, {"x": None}]}), ("now", {})]
    text = FORMATS[name].written(calls)
    for end in range(len(text) + 1):
        streamed, whole = read(name, text[:end], "length"), read(name, [text[:end]], "length")
        assert streamed == whole
        assert whole.finish_reason == "length"
        for call, (wanted, arguments) in zip(whole.calls, calls, strict=False):
            assert call.name == wanted
            assert json.dumps(arguments, ensure_ascii=False).startswith(call.arguments)


@pytest.mark.parametrize(
    ("name", "text", "wanted", "left"),
    [
        ("hermes", 'Let me see.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>', [("f", {})], "Let me see."),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [("f", {"a": 1})], ""),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", {"a": 1})], ""),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', [("f", {})], ""),
        ("hermes", '<tool_call>{"name": "f"}}</tool_call>', [("f", {})], ""),
        ("hermes", '<tool_call>{"function": {"name": "f", "parameters": {"a": 2}}}</tool_call>', [("f", {"a": 2})], ""),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "g"}', [("f", {}), ("g", {})], ""),
        ("hermes", "<tool_call>\nno call\n</tool_call>", [], "<tool_call>\nno call\n</tool_call>"),
        ("hermes", '<tool_call>{"a": 1}</tool_call>', [], '<tool_call>{"a": 1}</tool_call>'),
        ("hermes", "a </tool_call> <tool b", [], "a </tool_call> <tool b"),
        ("llama3_json", ' {"name": "now"}', [("now", {})], ""),
        ("llama3_json", '{"name": "other", "parameters": {}}', [], '{"name": "other", "parameters": {}}'),
        ("llama3_json", '{"name": "search", "age": 3}', [], '{"name": "search", "age": 3}'),
        ("llama3_json", '<|python_tag|>{"name": "other", "parameters": {}}', [("other", {})], ""),
        ("llama3_json", '{"type": "function", "name": "now", "parameters": {}} so', [("now", {})], "so"),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": "}"}[TOOL_CALLS]g{}', [("f", {"a": "}"}), ("g", {})], ""),
        ("mistral", 'So. [TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abc"}]', [("f", {})], "So."),
        ("mistral", "[TOOL_CALLS]f[CALL_ID]a1[ARGS]{}", [("f", {})], ""),
        ("mistral", "[TOOL_CALLS] nothing", [], "[TOOL_CALLS] nothing"),
        ("pythonic", '[search("cats", top=2)]', [("search", {"query": "cats", "top": 2})], ""),
        ("pythonic", "[now(a=true, b=None, c=(1, 2))] ok", [("now", {"a": True, "b": None, "c": [1, 2]})], "ok"),
        ("pythonic", "[now(a=f(1), b=0x10, c=1e999)]", [("now", {"a": "f(1)", "b": 16, "c": "1e999"})], ""),
        ("pythonic", r"[now(a='\d \ud83d')]", [("now", {"a": "\\d \ufffd"})], ""),
        ("pythonic", "[other(a=1)]", [], "[other(a=1)]"),
        ("pythonic", "<|python_start|>[other(a=1),]<|python_end|>", [("other", {"a": 1})], ""),
        ("pythonic", "[1, 2]", [], "[1, 2]"),
    ],
)
def test_what_models_write(name: str, text: str, wanted: list[tuple[str, Any]], left: str) -> None:
    answer = read(name, text)
    assert (calls_of(answer), answer.text) == (wanted, left)


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral"])
def test_the_beginning_of_a_further_call_is_no_text(name: str) -> None:
    whole = FORMATS[name].written([("search", {"query": "x"}), ("now", {})])
    first = len(FORMATS[name].written([("search", {"query": "x"})]))
    texts = {read(name, [whole[:end]], "length").text for end in range(first, len(whole))}
    assert all(len(text) < len("</tool_call>") for text in texts), "a part of a mark at most"
    assert not any("name" in text for text in texts)


def test_arguments_come_as_they_are_written() -> None:
    events = events_of("hermes", '<tool_call>{"name": "f", "arguments": {"a": 12}}</tool_call>')
    assert events[0] == CallStart(0, "id0", "f")
    assert [event.text for event in events if isinstance(event, ArgumentsDelta)] == list('{"a": 12}')
    pythonic = events_of("pythonic", "[search(query='x', top=1)]")
    assert [event.text for event in pythonic if isinstance(event, ArgumentsDelta)] == ['{"query": "x"', ', "top": 1}']


def test_reasoning_is_told_apart() -> None:
    text = 'I think <tool_call> </think>\n\nWell.\n<tool_call>{"name": "now"}</tool_call>'
    opened = read("hermes", text, tags=THINK, is_reasoning=True)
    assert (opened.reasoning, opened.text, calls_of(opened)) == ("I think <tool_call>", "Well.", [("now", {})])
    assert read("hermes", f"\n<think>\n{text}", tags=THINK) == opened
    cut_off = read("hermes", "<think>\nstill ", "length", tags=THINK)
    assert (cut_off.reasoning, cut_off.text, cut_off.finish_reason) == ("still", "", "length")
    assert read("hermes", "No <think> here", tags=THINK).text == "No <think> here"


def test_text_is_not_held_back_for_long() -> None:
    reader = make_reader("hermes")
    assert reader.read("One <") == [TextDelta("One")]
    assert reader.read("b> two") == [TextDelta(" <b> two")]


def test_deep_and_long_arguments_are_no_trouble() -> None:
    deep = "[" * 5000
    assert read("pythonic", [f"[now(a={deep})]"]).calls[0].arguments == ""
    closed = f"[now(a={'[' * 5000}{']' * 5000})]"
    assert json.loads(read("pythonic", [closed]).calls[0].arguments)["a"].startswith("[[[")
    assert read("mistral", ["[TOOL_CALLS]" + " " * 5000 + "x"]).text.endswith("x")
