"""Grammars of calls, asked what they take by the library that enforces them."""

from __future__ import annotations

from typing import Any

import llguidance
import llguidance.hf
import pytest

from kvcomm.engine.grammar import Grammar
from kvcomm.errors import InvalidRequest
from kvcomm.toolcalls.choice import CallGrammars, ToolChoice
from kvcomm.toolcalls.formats import FORMATS
from tests.toolcalls.answers import THINK
from tests.toolcalls.templates import HERMES, tokenizer_with

NAMES = ("hermes", "llama3_json", "mistral", "pythonic")
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"type": "string"}},
        },
    },
}
LATER: dict[str, Any] = {"type": "function", "function": {"name": "now_or_later"}}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW, LATER]
TOKENIZER = tokenizer_with(HERMES)
TOKENS = llguidance.hf.from_tokenizer(TOKENIZER, n_vocab=len(TOKENIZER))


def grammars(name: str, **settings: Any) -> CallGrammars:
    return CallGrammars(FORMATS[name], FORMATS[name].shape, {}, **settings)


def takes(grammars: CallGrammars, choice: ToolChoice, text: str, **settings: Any) -> bool:
    """Whether an answer may be that text."""
    grammar = grammars.of(TOOLS, choice, **settings)
    assert grammar is not None
    matcher = llguidance.LLMatcher(TOKENS, llguidance.LLMatcher.grammar_from_lark(grammar.source))
    assert not matcher.is_error(), matcher.get_error()
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def written(name: str, *calls: tuple[str, dict[str, Any]]) -> str:
    return FORMATS[name].written(calls)


BONN, HERE = ("weather", {"city": "Bonn"}), ("now", {})


@pytest.mark.parametrize("name", NAMES)
def test_required(name: str) -> None:
    required = ToolChoice("required")
    assert takes(grammars(name), required, written(name, BONN))
    assert takes(grammars(name), required, written(name, ("weather", {"city": "Bonn", "days": 2}), HERE))
    assert takes(grammars(name), required, written(name, ("now_or_later", {})))
    assert not takes(grammars(name), required, written(name, ("now_or", {})))
    assert not takes(grammars(name), required, "")
    assert not takes(grammars(name), required, "hello")
    assert not takes(grammars(name), required, written(name, ("weather", {"town": "Bonn"})))
    assert not takes(grammars(name), required, written(name, ("weather", {"days": 2})))
    assert not takes(grammars(name), required, written(name, ("other", {})))


@pytest.mark.parametrize("name", NAMES)
def test_one_call_and_some_tools_only(name: str) -> None:
    named = ToolChoice("required", ("now",), is_parallel=False)
    assert takes(grammars(name), named, written(name, HERE))
    assert not takes(grammars(name), named, written(name, HERE, HERE))
    assert not takes(grammars(name), named, written(name, BONN))
    allowed = ToolChoice("auto", ("now",))
    assert takes(grammars(name), allowed, written(name, HERE, HERE))
    assert not takes(grammars(name), allowed, written(name, BONN))


@pytest.mark.parametrize("name", NAMES)
def test_strict_tools_leave_answers_free_but_for_their_calls(name: str) -> None:
    auto = ToolChoice()
    for text in ("", "Hello.", "It is {x}, [1], <b>.", written(name, BONN)):
        assert takes(grammars(name), auto, text)
    assert not takes(grammars(name), auto, written(name, ("weather", {"town": 1})))


def test_text_around_calls() -> None:
    call = written("hermes", BONN)
    assert takes(grammars("hermes"), ToolChoice(), f"Well. {call}\n{call} So.")
    assert not takes(grammars("hermes"), ToolChoice(is_parallel=False), f"{call}\n{call}")


def test_reasoning_is_free() -> None:
    made, call = grammars("hermes", tags=THINK), written("hermes", BONN)
    for choice in (ToolChoice(), ToolChoice("required")):
        assert takes(made, choice, f"so <tool_call> what\n</think>\n\n{call}", is_reasoning=True)
        assert takes(made, choice, f"<think>hm</think>{call}")
        assert takes(made, choice, call)
        assert not takes(made, choice, "still", is_reasoning=True)
    assert not takes(made, ToolChoice("required"), "hm</think>hello", is_reasoning=True)


def test_control_tokens_are_tokens() -> None:
    tokenizer = tokenizer_with(HERMES, special=("[TOOL_CALLS]",))
    tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=len(tokenizer))
    mark = tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    form = FORMATS["mistral"]
    for choice in (ToolChoice("required"), ToolChoice()):
        grammar = CallGrammars(form, form.shape, {"[TOOL_CALLS]": mark}).of(TOOLS, choice, is_reasoning=False)
        assert grammar is not None
        matcher = llguidance.LLMatcher(tokens, llguidance.LLMatcher.grammar_from_lark(grammar.source))
        ids = tokenizer(written("mistral", BONN), add_special_tokens=False)["input_ids"]
        assert ids[0] == mark
        assert matcher.try_consume_tokens(ids) == len(ids)
        assert matcher.is_accepting()


def test_no_grammar_where_nothing_is_asked_for() -> None:
    loose = [NOW]
    assert grammars("hermes").of(loose, ToolChoice(), is_reasoning=False) is None
    assert grammars("hermes").of(TOOLS, ToolChoice("none"), is_reasoning=False) is None
    assert grammars("hermes").of((), ToolChoice(), is_reasoning=False) is None
    assert grammars("hermes").of(loose, ToolChoice(is_parallel=False), is_reasoning=False) is not None


def test_choices_that_cannot_be() -> None:
    with pytest.raises(InvalidRequest, match="no tools"):
        ToolChoice("required").allowed(())
    with pytest.raises(InvalidRequest, match="'other'"):
        ToolChoice("required", ("other",)).allowed(TOOLS)


REPLY = Grammar.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})


@pytest.mark.parametrize("name", NAMES)
def test_a_reply_of_a_schema_may_stand_for_calls(name: str) -> None:
    made = grammars(name)
    for text, wanted in (('{"a": 1}', True), (written(name, BONN), True), ("hello", False)):
        assert takes(made, ToolChoice(), text, reply=REPLY) is wanted
    assert not takes(made, ToolChoice("required"), '{"a": 1}', reply=REPLY)


def test_a_reply_comes_behind_reasoning() -> None:
    made = grammars("hermes", tags=THINK)
    for reply, text in (
        (REPLY, '{"a": 1}'),
        (Grammar.regex("[a-c]/[0-9]+"), "b/12"),
        (Grammar.choice(["yes", "no"]), "no"),
    ):
        assert takes(made, ToolChoice("none"), f"so</think>\n{text}", is_reasoning=True, reply=reply)
        assert not takes(made, ToolChoice("none"), text, is_reasoning=True, reply=reply)
        assert takes(made, ToolChoice("none"), text, reply=reply)
    assert grammars("hermes").of((), ToolChoice(), reply=REPLY) is REPLY
    with pytest.raises(InvalidRequest, match="beside tools"):
        grammars("hermes").of(TOOLS, ToolChoice(), reply=Grammar.lark('start: "a"'))


def test_parameters_are_an_object() -> None:
    made = grammars("pythonic")
    for parameters in ({"type": "string"}, {"type": ["null"]}):
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        with pytest.raises(InvalidRequest, match="'object'"):
            made.of([tool], ToolChoice("required"))
    odd = {"properties": {"a": {}}, "required": 5, "type": ["object", "null"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": odd}}
    assert made.of([tool], ToolChoice("required")) is not None
