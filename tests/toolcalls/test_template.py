"""What a chat template can show is found out by rendering, and what it cannot is shown all the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvcomm.errors import TemplateError
from kvcomm.toolcalls.formats import FORMATS
from kvcomm.toolcalls.template import ToolTemplate
from tests.toolcalls import templates
from tests.toolcalls.answers import TOOLS
from tests.toolcalls.templates import tokenizer_with

HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Cats?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "search", "arguments": {"query": "cats"}}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "Some cats."},
]


@pytest.mark.parametrize(
    ("template", "shows_tools", "shows_history", "name"),
    [
        (templates.HERMES, True, True, "hermes"),
        (templates.THINKING, True, True, "hermes"),
        (templates.LLAMA, True, True, "llama3_json"),
        (templates.MISTRAL, True, True, "mistral"),
        (templates.AS_TEXT, True, True, "hermes"),
        (templates.REPR, True, True, "hermes"),
        (templates.NAMELESS, True, False, "hermes"),
        (templates.PYTHONIC, True, True, "pythonic"),
        (templates.XML, True, True, "qwen3_xml"),
        (templates.NO_PLACE, False, False, "hermes"),
        (templates.NO_SYSTEM, False, False, "hermes"),
    ],
)
def test_what_a_template_shows(template: str, shows_tools: bool, shows_history: bool, name: str) -> None:
    found = ToolTemplate(tokenizer_with(template))
    assert (found.shows_tools, found.shows_history, found.format.name) == (shows_tools, shows_history, name)
    assert found.is_known is shows_history
    written = found.render(HISTORY, tools=TOOLS)
    for part in ("Cats?", "search", "now", "cats", "Some cats.", "query"):
        assert part in written
    found.require_shown(HISTORY, tools=TOOLS)


@pytest.mark.parametrize(
    ("template", "has_between"),
    [(templates.HERMES, True), (templates.THINKING, True), (templates.LLAMA, False), (templates.MISTRAL, True)],
)
def test_the_shape_of_calls_is_the_templates_own(template: str, has_between: bool) -> None:
    found = ToolTemplate(tokenizer_with(template))
    shape = found.shape
    assert shape is not None
    assert (shape.between is not None) is has_between
    tool_call = {"id": "abcdefghi", "type": "function", "function": {"name": "search", "arguments": {"query": "cats"}}}
    for num_calls in (1, 2) if has_between else (1,):
        conversation = [*HISTORY[:1], {"role": "assistant", "content": "", "tool_calls": [tool_call] * num_calls}]
        shown = shape.written([("search", '{"query": "cats"}')] * num_calls)
        assert shown + "<|im_end|>" in found.render(conversation, speaks=False)


def test_the_shape_is_ours_where_the_template_shows_none() -> None:
    assert ToolTemplate(tokenizer_with(templates.NO_PLACE)).shape == FORMATS["hermes"].shape
    assert ToolTemplate(tokenizer_with(templates.LLAMA), "mistral").shape == FORMATS["mistral"].shape
    assert ToolTemplate(tokenizer_with(templates.PYTHONIC)).shape == FORMATS["pythonic"].shape
    assert ToolTemplate(tokenizer_with(templates.XML)).shape is None


def test_arguments_are_given_as_the_template_wants_them() -> None:
    for template in (templates.AS_TEXT, templates.REPR):
        assert '"arguments": {"query": "cats"}' in ToolTemplate(tokenizer_with(template)).render(HISTORY)
    broken = json.loads(json.dumps(HISTORY))
    broken[1]["tool_calls"][0]["function"]["arguments"] = '{"query": '
    for template in (templates.HERMES, templates.AS_TEXT, templates.NO_PLACE, templates.PYTHONIC):
        found = ToolTemplate(tokenizer_with(template))
        if template is not templates.PYTHONIC:
            assert "query" in found.render(broken)


def test_tools_stand_in_the_first_user_message_where_there_is_no_system() -> None:
    written = ToolTemplate(tokenizer_with(templates.NO_SYSTEM)).render(HISTORY, tools=TOOLS)
    assert written.startswith("<|im_start|>user\nYou can call")
    assert "\n\nCats?<|im_end|>" in written


def test_results_that_follow_each_other_are_one_message() -> None:
    found = ToolTemplate(tokenizer_with(templates.NO_PLACE))
    more = [{"role": "tool", "tool_call_id": "x", "content": "More."}, {"role": "user", "content": "So?"}]
    written = found.render([*HISTORY, *more])
    assert written.count("<|im_start|>user") == 2
    assert "<tool_response>\nSome cats.\n</tool_response>\n<tool_response>\nMore.\n</tool_response>\nSo?" in written
    assert HISTORY[1]["tool_calls"], "nothing that was given is changed"


def test_foreign_ids_are_shortened_for_mistral() -> None:
    written = ToolTemplate(tokenizer_with(templates.MISTRAL)).render(HISTORY)
    assert '"name": "search"' in written
    assert len(FORMATS["mistral"].new_id()) == 9


def test_what_is_dropped_is_told() -> None:
    forgetful = templates.HERMES.replace(
        "{{ message.content }}", "{{ message.content if message.role != 'tool' or loop.last }}"
    )
    found = ToolTemplate(tokenizer_with(forgetful))
    found.require_shown(HISTORY)
    with pytest.raises(TemplateError, match=r"messages\[2\].content: the model's chat template drops it"):
        found.require_shown([*HISTORY, {"role": "user", "content": "And?"}])
    found.require_shown([*HISTORY, {"role": "user", "content": "And?"}], num_before=3)
