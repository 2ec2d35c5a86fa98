"""Models that say themselves how their answers are read: transformers' own parser is the judge."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_parsing import parse_response

from kvcomm.toolcalls.declared import DeclaredParser
from kvcomm.toolcalls.events import Answer, collected
from kvcomm.toolcalls.formats import FORMATS
from kvcomm.toolcalls.reader import AnswerReader
from kvcomm.toolcalls.writer import AnswerWriter
from tests.toolcalls.answers import TOOLS, cut, numbered

CHANNELS: dict[str, Any] = {
    "start_anchor": "<|turn>model\n",
    "fields": {
        "thinking": {"open": "<|channel>thought\n", "close": "<channel|>"},
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
            "close": "<tool_call|>",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": "<turn|>"},
    },
}
XML = FORMATS["qwen3_xml"].declared
assert XML is not None
CHANNELLED = (
    '<|channel>thought\nCats, then.<channel|>I look.<|tool_call>call:search{query:<|"|>cats<|"|>,top:3}<tool_call|>'
)
TAGGED = (
    "I look.\n<tool_call>\n<function=search>\n<parameter=query>\ncats\n</parameter>\n<parameter=top>\n3\n</parameter>\n"
    "</function>\n</tool_call>"
)
TYPED = json.loads(json.dumps(TOOLS))
TYPED[0]["function"]["parameters"]["properties"] = {"query": {"type": "string"}, "top": {"type": "integer"}}


def read(template: Any, pieces: Any, *, prompt: str = "", tools: Any = TYPED, reason: str = "stop") -> Answer:
    writer = AnswerWriter(numbered())
    reader = AnswerReader(writer, DeclaredParser(writer, template, prompt=prompt, tools=tools))
    events = [event for piece in pieces for event in reader.read(piece)]
    return collected([*events, *reader.finish(reason)])


@pytest.mark.parametrize(("template", "text"), [(CHANNELS, CHANNELLED), (XML, TAGGED)])
def test_a_call_is_what_transformers_reads(template: Any, text: str) -> None:
    answer = read(template, text)
    wanted = parse_response(text, dict(template), prefix="", tools=TYPED)  # type: ignore[no-untyped-call]  # it has none
    (call,) = answer.calls
    assert {"name": call.name, "arguments": json.loads(call.arguments)} == wanted["tool_calls"][0]["function"]
    assert json.loads(call.arguments) == {"query": "cats", "top": 3}
    assert (answer.text, answer.reasoning) == (wanted["content"], wanted.get("thinking", ""))
    assert answer.finish_reason == "tool_calls"


@pytest.mark.parametrize(("template", "text"), [(CHANNELS, CHANNELLED), (XML, TAGGED)])
def test_cut_anywhere_it_is_read_alike(template: Any, text: str) -> None:
    for end in range(len(text) + 1):
        whole = read(template, [text[:end]], reason="length")
        assert read(template, text[:end], reason="length") == whole
        assert whole.finish_reason == "length"
        assert bool(whole.calls) is (end == len(text))
    unmarked = text.removesuffix("<tool_call|>").removesuffix("\n</tool_call>")
    assert read(template, unmarked).calls, "the model's end token may stand for the mark"


PIECES = (
    *("<think>", "</think>", "<tool_call>", "<function=a>", "<parameter=b>", "</parameter>", "</function>"),
    *("</tool_call>", "<|tool_call>call:f", '{"a":', "}", "<tool_call|>", "\n", " ", "x", "<", ">", "{", "🙂"),
)


@given(
    text=st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    cuts=st.lists(st.integers(0, 1000), max_size=6),
)
def test_how_an_answer_is_cut_changes_nothing(text: str, cuts: list[int]) -> None:
    for template in (CHANNELS, XML):
        assert read(template, cut(text, cuts)) == read(template, [text])


def test_a_prompt_may_have_begun_a_region() -> None:
    prompt = "<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n<think>\n"
    answer = read(XML, "So.\n</think>\n\nYes.", prompt=prompt)
    assert (answer.reasoning, answer.text) == ("So.", "Yes.")
    assert read(XML, "Yes.", prompt="<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n").text == "Yes."


def test_what_says_nothing_is_text() -> None:
    answer = read(CHANNELS, "<|tool_call>call:f{a:<tool_call|> and so on")
    assert not answer.calls
    assert "{a:" in answer.text
    assert answer.text.endswith("and so on")
    assert not read(XML, TAGGED, tools=None).calls
