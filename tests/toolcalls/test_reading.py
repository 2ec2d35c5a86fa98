"""Readers for a model: which markers are special tokens, whether a prompt leaves reasoning open."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from kvcomm.engine.results import Choice, Chunk
from kvcomm.toolcalls.events import Answer, Finish, TextDelta, collected
from kvcomm.toolcalls.reading import AnswerReaders
from kvcomm.toolcalls.template import ToolTemplate
from tests.toolcalls import templates
from tests.toolcalls.answers import TOOLS, calls_of, numbered
from tests.toolcalls.templates import tokenizer_with

SPECIAL = ("[TOOL_CALLS]", "[ARGS]", "<|other|>")


def readers_of(tokenizer: PreTrainedTokenizerBase) -> AnswerReaders:
    return AnswerReaders(tokenizer, ToolTemplate(tokenizer))


def both(tokenizer: PreTrainedTokenizerBase, text: str, prompt: str = "") -> Answer:
    """An answer of these tokens, read whole, and the same streamed."""
    readers = readers_of(tokenizer)
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    shown = str(tokenizer.decode(ids, skip_special_tokens=True))
    make = lambda: readers.make(TOOLS, prompt, new_id=numbered())  # noqa: E731  # two of them, alike
    whole = make().whole(Choice(0, shown, ids, "stop", None))
    reader, before, events = make(), "", []
    for at, token in enumerate(ids):
        now = str(tokenizer.decode(ids[: at + 1], skip_special_tokens=True)).rstrip("\ufffd")
        events += reader.chunk(Chunk(0, now[len(before) :], (token,), None, None))
        before = now
    events += reader.chunk(Chunk(0, shown[len(before) :], (), None, "stop"))
    assert collected(events) == whole
    return whole


def test_markers_that_are_special_tokens_are_seen_and_others_are_not() -> None:
    tokenizer = tokenizer_with(templates.MISTRAL, special=SPECIAL)
    answer = both(tokenizer, 'So <|other|>🙂 [TOOL_CALLS]search[ARGS]{"query": "漢"}[TOOL_CALLS]now[ARGS]{}')
    assert (answer.text, calls_of(answer)) == ("So 🙂", [("search", {"query": "漢"}), ("now", {})])


def test_markers_that_are_text() -> None:
    answer = both(tokenizer_with(templates.HERMES), 'Well.<tool_call>{"name": "now", "arguments": {"a": "🙂"}}')
    assert (answer.text, calls_of(answer)) == ("Well.", [("now", {"a": "🙂"})])


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")])
def test_reasoning_that_the_prompt_has_begun(special: tuple[str, ...]) -> None:
    tokenizer = tokenizer_with(templates.THINKING, special=special)
    template = ToolTemplate(tokenizer)
    prompt = template.render([{"role": "user", "content": "<think> hm"}])
    assert readers_of(tokenizer).is_reasoning(prompt)
    assert readers_of(tokenizer).is_reasoning(prompt + "I go on")
    assert not readers_of(tokenizer).is_reasoning(prompt + "done</think>")
    assert not readers_of(tokenizer).is_reasoning(
        template.render([{"role": "user", "content": "<think>"}], speaks=False)
    )
    answer = both(tokenizer, "Hm.</think>\nFour.", prompt)
    assert (answer.reasoning, answer.text) == ("Hm.", "Four.")


def test_models_that_do_not_reason_have_no_tags() -> None:
    tokenizer = tokenizer_with(templates.HERMES)
    assert not readers_of(tokenizer).needs_prompt
    assert both(tokenizer, "<think>a</think>b").text == "<think>a</think>b"


def test_text_never_waits_where_no_calls_can_come() -> None:
    reader = readers_of(tokenizer_with(templates.HERMES)).make(None, "")
    pieces = ["Well ", "\n", " <tool_call>", " "]
    events = [reader.chunk(Chunk(0, piece, (), None, None)) for piece in pieces]
    assert events == [[TextDelta(piece)] for piece in pieces]
    assert reader.chunk(Chunk(0, "", (), None, "stop")) == [Finish("stop")]


def test_declared_answers_show_all_special_tokens() -> None:
    tokenizer = tokenizer_with(templates.HERMES, special=("<|say|>", "<|call|>", "<|end|>"))
    tokenizer.response_template = {
        "start_anchor": "assistant\n",
        "fields": {
            "content": {"open": "<|say|>", "close": "<|end|>"},
            "tool_calls": {
                "open": "<|call|>",
                "close": "<|end|>",
                "content": "json",
                "repeats": True,
                "transform": {"type": "function", "function": "{content}"},
            },
        },
    }
    answer = both(tokenizer, '<|say|>Well.<|end|><|call|>{"name": "now", "arguments": {}}<|end|>')
    assert (answer.text, calls_of(answer)) == ("Well.", [("now", {})])
