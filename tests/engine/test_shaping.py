"""Biases, penalties, least lengths, and log-probabilities of prompts, against closed forms and the stock forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvcomm import Engine, SamplingParams
from kvcomm.engine.sampler import Sampler
from kvcomm.errors import InvalidRequest
from tests.engine.conftest import some_tokens, stock_logits
from tests.tiny import TinyModel

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0])
PROMPT = np.array([4, 4, 1], dtype=np.int32)


def sampled(answer: list[int], logits: torch.Tensor = LOGITS, **settings: Any) -> int | None:
    sampler = Sampler(SamplingParams(**settings), 0, entropy=0, end_token_ids=(1,))
    return sampler.sample(logits, np.array([*PROMPT, *answer], dtype=np.int32), len(answer))


@pytest.mark.parametrize(
    ("answer", "settings", "expected"),
    [
        ([], {"logit_bias": {0: 2.5}}, 0),
        ([], {"logit_bias": {1: -100}}, 2),
        ([], {"logit_bias": ((1, -1.5), (3, 2.6))}, 3),
        ([1], {"frequency_penalty": 0.5}, 1),
        ([1, 1, 1], {"frequency_penalty": 0.5}, 2),
        ([1, 1, 1], {"presence_penalty": 0.5}, 1),
        ([1], {"presence_penalty": 1.1}, 2),
        ([1, 2, 2], {"presence_penalty": 0.6, "frequency_penalty": 0.6}, 1),
        ([2], {"presence_penalty": -1.5}, 2),
        ([], {"frequency_penalty": 5.0}, 1),  # the prompt does not count
        ([], {"min_tokens": 1}, 2),
        ([], {"min_tokens": 1, "stop_token_ids": (2, 99)}, 0),
        ([2], {"min_tokens": 1}, 1),
    ],
)
def test_what_is_taken(answer: list[int], settings: dict[str, Any], expected: int) -> None:
    assert sampled(answer, **settings) == expected
    assert torch.equal(LOGITS, torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0]))


def test_a_bias_comes_before_the_temperature() -> None:
    """As if the model had said so: drawn with the frequencies of the biased distribution."""
    params = SamplingParams(temperature=2.0, logit_bias={4: 3.0})
    sampler = Sampler(params, 0, entropy=1)
    drawn = [sampler.sample(LOGITS, PROMPT) for _ in range(4000)]
    biased = LOGITS + torch.tensor([0.0, 0, 0, 0, 3])
    for token, probability in enumerate((biased / 2).softmax(-1).tolist()):
        assert abs(drawn.count(token) / 4000 - probability) < 5 * (probability * (1 - probability) / 4000) ** 0.5


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"logit_bias": [5]}, "logit_bias"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"),
        ({"logit_bias": {5: "x"}}, "logit_bias"),
        ({"logit_bias": {5: float("inf")}}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(5000), 1.0)}, "logit_bias"),
        ({"logit_bias": {10**6: 1.0}}, "1000000"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"presence_penalty": "1"}, "presence_penalty"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 9, "max_new_tokens": 8}, "min_tokens"),
        ({"prompt_logprobs": 101}, "prompt_logprobs"),
    ],
)
def test_what_is_refused(engine: Engine, settings: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidRequest, match=name):
        engine.generate("x", **settings)


def test_only_plain_settings_are_greedy() -> None:
    assert SamplingParams().is_greedy
    for settings in (
        {"logit_bias": {1: 1.0}},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"min_tokens": 1},
        {"temperature": 1.0},
    ):
        assert not SamplingParams(**settings).is_greedy


def test_a_least_length_goes_over_ends_and_stop_strings(engine: Engine) -> None:
    bias = {2: 100.0}
    assert engine.generate("Hello", max_new_tokens=20, logit_bias=bias).token_ids == ()
    longer = engine.generate("Hello", max_new_tokens=20, logit_bias=bias, min_tokens=7)
    assert (len(longer.token_ids), longer.finish_reason) == (7, "stop")
    free = engine.generate("Hello", max_new_tokens=20, ignore_eos=True)
    stop = free.text[1:3]
    late = engine.generate("Hello", max_new_tokens=20, ignore_eos=True, stop=(stop,), min_tokens=10)
    assert free.text.startswith(late.text)
    assert len(late.token_ids) >= 10 or late.finish_reason == "length"
    assert stop in late.text


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 9, 50])
def test_log_probabilities_of_a_prompt(engine: Engine, shared_model: TinyModel, num_tokens: int) -> None:
    """Chunk by chunk, with and without a cached prefix, beside other requests: as the stock forward says."""
    prompt = some_tokens(num_tokens)
    expected = stock_logits(shared_model.model, prompt).float().log_softmax(-1)
    for _ in range(2):  # the second time all of it is cached
        other = engine.submit(some_tokens(30, seed=1), max_new_tokens=20, ignore_eos=True)
        done = engine.generate(prompt, max_new_tokens=2, prompt_logprobs=3)
        other.result()
        scored = done.prompt_logprobs
        assert scored is not None
        assert (len(scored), scored[0]) == (num_tokens, None)
        for at, told in enumerate(scored[1:], 1):
            assert told is not None
            assert told.token_id == prompt[at]
            assert told.logprob == pytest.approx(float(expected[at - 1, prompt[at]]), abs=1e-4)
            values, ids = expected[at - 1].topk(3)
            assert [each.token_id for each in told.top] == ids.tolist()
            assert [each.logprob for each in told.top] == pytest.approx(values.tolist(), abs=1e-4)
        plain = engine.generate(prompt, max_new_tokens=2)
        assert (done.token_ids, plain.prompt_logprobs) == (plain.token_ids, None)
        assert done.usage.computed_tokens == num_tokens


def test_prompts_are_scored_without_an_answer_and_with_several(engine: Engine) -> None:
    prompt = some_tokens(20)
    nothing = engine.generate(prompt, max_new_tokens=0, prompt_logprobs=0)
    several = engine.generate(prompt, max_new_tokens=3, n=3, temperature=1.0, prompt_logprobs=0, logprobs=1)
    assert nothing.finish_reason == "length"
    assert nothing.prompt_logprobs is not None
    assert several.prompt_logprobs is not None
    assert [each and each.token_id for each in several.prompt_logprobs] == [None, *prompt[1:]]


def test_a_context_does_not_score_what_it_holds(engine: Engine) -> None:
    with engine.context("Hello") as context:
        with pytest.raises(InvalidRequest, match="prompt_logprobs"):
            context.submit(prompt="world", prompt_logprobs=0)
        assert not context.busy
