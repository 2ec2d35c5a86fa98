"""Answers under a grammar: what it allows and nothing else, whatever else is asked for, whatever the model says."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema_rs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcomm import Engine, Grammar, SamplingParams
from kvcomm.config import EngineConfig
from kvcomm.errors import InvalidRequest
from tests.engine.conftest import SMALL
from tests.tiny import TinyModel, tiny_model

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 2},
    },
    "required": ["name", "age", "pets"],
}
PROMPT = "Question: how many apples are left? Answer:"
END = 2  # <|im_end|>


def generate(engine: Engine, grammar: Grammar, **settings: Any) -> Any:
    return engine.generate(PROMPT, SamplingParams(grammar=grammar, **{"max_new_tokens": 200, **settings}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.5, "seed": 3},
        {"temperature": 1.0, "top_k": 3, "seed": 1},
        {"temperature": 1.0, "top_p": 0.5, "min_p": 0.2, "seed": 2},
        {"logprobs": 2},
        {"repetition_penalty": 1.5, "frequency_penalty": 1.0, "presence_penalty": 0.5},
        {"ignore_eos": True},
        {"min_tokens": 150},
        {"logit_bias": {END: 100.0}},
        {"n": 3, "temperature": 2.0, "seed": 5},
    ],
)
def test_answers_validate(engine: Engine, settings: dict[str, Any]) -> None:
    """A random model, so what makes them valid is the grammar alone."""
    for choice in generate(engine, Grammar.json_schema(PERSON), **settings).choices:
        assert choice.finish_reason == "stop"
        assert jsonschema_rs.is_valid(PERSON, json.loads(choice.text))
        assert END not in choice.token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_answer_depends_on_nothing_around_it(shared_model: TinyModel, temperature: float) -> None:
    """Guesses, forced tokens with and without logits, and other requests in the batch change no token."""
    answers = set()
    for config in (SMALL, EngineConfig(page_size=4, pool_tokens=1024, draft_rows=0)):
        with Engine(shared_model.model, shared_model.tokenizer, config=config) as engine:
            for logprobs in (None, 0, 3):
                params = SamplingParams(
                    max_new_tokens=200,
                    temperature=temperature,
                    seed=7,
                    grammar=Grammar.json_schema(PERSON),
                    logprobs=logprobs,
                )
                others = [engine.submit("The quick brown fox", max_new_tokens=30, temperature=2.0) for _ in range(2)]
                others.append(engine.submit(PROMPT, max_new_tokens=30, grammar=Grammar.regex("[ab]{1,20}")))
                answers.add(engine.generate(PROMPT, params).token_ids)
                texts = [other.result().text for other in others]
                assert re.fullmatch("[ab]{1,20}", texts[-1])
    assert len(answers) == 1


def test_log_probabilities_are_the_models_own(engine: Engine) -> None:
    """Of every token, forced ones too: the same that the prompt's would be."""
    answer = generate(engine, Grammar.json_schema(PERSON), logprobs=1)
    assert answer.logprobs is not None
    assert [each.token_id for each in answer.logprobs] == list(answer.token_ids)
    prompt = [token for segment in engine.read_prompt(PROMPT, is_start=True) for token in segment.token_ids]
    scored = engine.generate([*prompt, *answer.token_ids], max_new_tokens=0, prompt_logprobs=0).prompt_logprobs
    assert scored is not None
    for told, again in zip(answer.logprobs, scored[len(prompt) :], strict=True):
        assert again is not None
        assert told.logprob == pytest.approx(again.logprob, abs=1e-4)


def test_forced_tokens_cost_no_passes(engine: Engine) -> None:
    text = "There is exactly one way to write this answer."
    answer = generate(engine, Grammar.choice([text]))
    assert (answer.text, answer.finish_reason) == (text, "stop")
    assert answer.usage.guessed_tokens >= answer.usage.generated_tokens - 1


def test_a_cut_answer_is_a_beginning(engine: Engine) -> None:
    whole = generate(engine, Grammar.json_schema(PERSON))
    for num in range(1, len(whole.token_ids)):
        cut = generate(engine, Grammar.json_schema(PERSON), max_new_tokens=num)
        assert (cut.finish_reason, cut.token_ids) == ("length", whole.token_ids[:num])
    exactly = generate(engine, Grammar.json_schema(PERSON), max_new_tokens=len(whole.token_ids))
    assert (exactly.finish_reason, exactly.text) == ("stop", whole.text)


def test_a_stop_string_cuts_it_too(engine: Engine) -> None:
    answer = generate(engine, Grammar.json_schema(PERSON), stop=('"age"',))
    assert (answer.finish_reason, '"age"' in answer.text) == ("stop", False)
    assert answer.text.startswith('{"name": ')


def test_streams_are_the_whole_answer(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=200, grammar=Grammar.json_schema(PERSON), logprobs=0)
    handle = engine.submit(PROMPT, params)
    chunks, whole = list(handle), handle.result()
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.token_ids
    assert [each for chunk in chunks for each in chunk.logprobs or ()] == list(whole.logprobs or ())
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]


def test_contexts_go_on_behind_it(engine: Engine) -> None:
    with engine.context(PROMPT) as context:
        fork = context.fork()
        first = context.generate(json_schema=PERSON, max_new_tokens=200)
        assert fork.generate(json_schema=PERSON, max_new_tokens=200).token_ids == first.token_ids
        fork.release()
        assert context.text.endswith(first.text)
        tokens = context.tokens
        second = context.generate(grammar=Grammar.regex("(yes|no)"), max_new_tokens=9)
        assert second.text in ("yes", "no")
    cold = engine.generate(tokens, grammar=Grammar.regex("(yes|no)"), max_new_tokens=9, reads_cache=False)
    assert cold.text == second.text


def test_the_end_comes_only_where_the_grammar_accepts(engine: Engine) -> None:
    """The bias makes the model end as soon as it may."""
    grammar = Grammar.regex("[a-z]{5,30}")
    assert len(generate(engine, grammar, logit_bias={END: 100.0}).text) in range(5, 16)
    wanted = generate(engine, grammar, logit_bias={END: 100.0}, min_tokens=12)
    assert len(wanted.token_ids) >= 12
    forever = generate(engine, Grammar.regex("[a-z]{5,}"), ignore_eos=True, max_new_tokens=40, logit_bias={END: 100.0})
    assert (forever.finish_reason, len(forever.token_ids)) == ("length", 40)


def test_stop_tokens_come_where_the_end_may(engine: Engine) -> None:
    stop = engine.encoder.plain("~")[0]
    answer = generate(engine, Grammar.regex("[a-z]{5,30}"), stop_token_ids=(stop,), logit_bias={stop: 100.0})
    assert answer.finish_reason == "stop"
    assert re.fullmatch("[a-z]{5,15}", answer.text)


def test_control_tokens_come_only_where_they_are_named(engine: Engine) -> None:
    controls = dict.fromkeys(range(3), 50.0)
    free = generate(engine, Grammar.regex("(.|\n){20,40}"), logit_bias=controls | {END: 0.0}, temperature=1.0, seed=1)
    assert not {0, 1, 2} & set(free.token_ids)
    named = generate(engine, Grammar.lark('start: "a" <|im_start|> "b" <|im_end|> "c"'))
    assert (named.token_ids[1], named.token_ids[3], named.finish_reason) == (1, 2, "stop")
    assert named.text == "abc"


def test_a_grammar_that_grows_too_dear_ends_its_request_alone(engine: Engine) -> None:
    other = engine.submit(PROMPT, max_new_tokens=50)
    dear = Grammar.regex(r"(\w{1,50}\s?){1,500}")
    with pytest.raises(InvalidRequest, match="cannot go on under"):
        generate(engine, dear, max_new_tokens=300, temperature=2.0, seed=1)
    assert other.result().usage.generated_tokens > 0


@given(
    schema=st.recursive(
        st.one_of(
            st.sampled_from(
                [
                    {"type": "integer", "minimum": -99, "maximum": 99},
                    {"type": "boolean"},
                    {"type": "null"},
                    {"type": "string", "maxLength": 4},
                    {"const": 'a "quoted" \\ é 漢'},
                ]
            ),
            st.builds(lambda values: {"enum": values}, st.lists(st.text(max_size=3) | st.integers(-5, 5), min_size=1)),
        ),
        lambda inner: st.one_of(
            st.builds(lambda each: {"type": "array", "items": each, "maxItems": 2}, inner),
            st.builds(lambda some: {"anyOf": some}, st.lists(inner, min_size=1, max_size=2)),
            st.builds(
                lambda found: {"type": "object", "properties": found, "required": list(found)},
                st.dictionaries(st.text(max_size=3), inner, min_size=1, max_size=2),
            ),
        ),
        max_leaves=4,
    ),
    seed=st.integers(0, 99),
)
def test_any_schema_of_these_kinds(constrained: Engine, schema: dict[str, Any], seed: int) -> None:
    answer = constrained.generate("x", json_schema=schema, max_new_tokens=300, temperature=1.0, seed=seed)
    assert answer.finish_reason == "stop"
    assert jsonschema_rs.is_valid(schema, json.loads(answer.text)), answer.text


@pytest.fixture(scope="module")
def constrained(shared_model: TinyModel) -> Any:
    with Engine(shared_model.model, shared_model.tokenizer, config=SMALL) as made:
        yield made
        made.check_integrity()


def test_more_ids_than_the_tokenizer_has() -> None:
    """Models pad their vocabulary; such an id has no text and comes up in no answer."""
    tiny = tiny_model()
    tiny.model.resize_token_embeddings(len(tiny.tokenizer) + 70)
    with torch.no_grad():
        tiny.model.lm_head.weight[len(tiny.tokenizer) :] = 100.0
    with Engine(tiny.model, tiny.tokenizer, config=SMALL) as engine:
        answer = engine.generate(PROMPT, json_schema=PERSON, max_new_tokens=200)
        assert jsonschema_rs.is_valid(PERSON, json.loads(answer.text))


def test_what_is_no_grammar_is_refused_by_name(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="grammar must be a Grammar"):
        engine.generate(PROMPT, grammar={"type": "object"})
    with pytest.raises(InvalidRequest, match="either a grammar or a json_schema"):
        engine.generate(PROMPT, grammar=Grammar.regex("a"), json_schema={})
    with pytest.raises(InvalidRequest, match="'not'"):
        engine.generate(PROMPT, json_schema={"type": "string", "not": {"const": "a"}})
    assert not engine.scheduler.has_work
