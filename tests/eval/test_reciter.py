"""The model that recites: every token at its place, whatever is cached, batched or forbidden."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.clients.reciter import RECITE, SPEAK, make_engine, make_reciter
from kvcomm.engine.engine import Engine
from kvcomm.engine.sampling import SamplingParams
from tests.tiny import tiny_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"$ref": "#/$defs/unit"}},
            "required": ["city", "unit"],
            "$defs": {"unit": {"enum": ["celsius", "kelvin"]}},
        },
    },
}
QUESTION = {"role": "user", "content": "how is the weather?"}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}\n</tool_call>'


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """A reciting engine with small pages and chunks."""
    with make_engine(tiny_tokenizer(), page_size=4, pool_tokens=32_768, prefill_chunk=16, max_batch_tokens=64) as made:
        yield made
        made.check_integrity()


def said(engine: Engine, prompt: Any, **sampling: Any) -> str:
    """The answer."""
    return engine.generate(prompt, max_new_tokens=1000, **sampling).text


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60), before=st.text("ab \n", max_size=40))
@settings(max_examples=30, deadline=None)
def test_any_text_comes_back(engine: Engine, text: str, before: str) -> None:
    """Also where the same text stands in the prompt before, in marks of its own."""
    prompt = f"{before}{RECITE}something else{SPEAK}something{before}{RECITE}{text}{SPEAK}"
    assert said(engine, prompt) == text


def test_a_long_text_far_from_the_start(engine: Engine) -> None:
    text = " ".join(f"word {at}" for at in range(60))
    assert said(engine, f"{'padding ' * 2000}{RECITE}{text}{SPEAK}") == text


def test_cached_forked_and_at_once(engine: Engine) -> None:
    prompts = [f"the same beginning{RECITE}text number {at}{SPEAK}" for at in range(6)]
    expected = [f"text number {at}" for at in range(6)]
    handles = [engine.submit(prompt, SamplingParams(max_new_tokens=40)) for prompt in prompts]
    assert [handle.result().text for handle in handles] == expected
    assert [said(engine, prompt) for prompt in prompts] == expected  # all but the last token is cached
    with engine.context(f"{RECITE}from a context") as context, context.fork() as fork:
        assert fork.extend(SPEAK).generate(max_new_tokens=40).text == "from a context"


def test_drawing_makes_no_difference(engine: Engine) -> None:
    assert said(engine, f"{RECITE}for sure{SPEAK}", temperature=1.0, seed=3) == "for sure"


def test_without_marks_it_says_nothing(engine: Engine) -> None:
    assert said(engine, "no marks at all") == ""


def test_the_template_calls_first_and_has_a_last_word(engine: Engine) -> None:
    first = engine.chat_prompt([QUESTION], tools=[TOOL])
    assert said(engine, first) == CALL
    call = {"function": {"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": "sunny"}
    assert said(engine, engine.chat_prompt([QUESTION, answer, result], tools=[TOOL])).startswith("It is sunny")
    assert said(engine, engine.chat_prompt([QUESTION])).startswith("It is sunny")


def test_a_conversation_begins_as_it_did() -> None:
    """Else no context could go on with it."""
    tokenizer = make_reciter(tiny_tokenizer()).tokenizer
    call = {"function": {"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}}
    messages = [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sun"},
    ]

    def render(length: int) -> str:
        text = tokenizer.apply_chat_template(
            messages[:length], tools=[TOOL], tokenize=False, add_generation_prompt=True
        )
        assert isinstance(text, str)
        return text

    assert render(3).startswith(render(1) + CALL)
