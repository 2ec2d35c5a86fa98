"""What is drawn, against closed forms and frequencies; and what is refused."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from kvcomm.engine.context import sampling_params
from kvcomm.engine.sampling import Sampler, SamplingParams, token_logprob
from kvcomm.errors import InvalidRequest

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0])
NOTHING_SEEN = np.zeros(0, dtype=np.int32)


def frequencies(num_draws: int = 4000, **settings: object) -> Counter[int]:
    sampler = Sampler(sampling_params(None, settings), 0, entropy=1)
    return Counter(sampler.sample(LOGITS, NOTHING_SEEN) for _ in range(num_draws))


def test_greedy_takes_the_best_and_the_first_of_equals() -> None:
    sampler = Sampler(SamplingParams(), 0, entropy=0)
    assert sampler.sample(LOGITS, NOTHING_SEEN) == 1
    assert sampler.sample(torch.tensor([2.0, 5.0, 5.0]), NOTHING_SEEN) == 1


def test_temperature_draws_the_softmax() -> None:
    drawn = frequencies(temperature=2.0)
    expected = (LOGITS / 2).softmax(-1)
    for token, probability in enumerate(expected.tolist()):
        # Five standard errors of 4,000 draws.
        assert abs(drawn[token] / 4000 - probability) < 5 * (probability * (1 - probability) / 4000) ** 0.5


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.6}, {1}),
        ({"top_p": 0.7}, {1, 2}),
        ({"min_p": 0.1}, {0, 1, 2}),
        ({}, {0, 1, 2, 3, 4}),
    ],
)
def test_filters_keep_what_they_say(settings: dict[str, object], allowed: set[int]) -> None:
    assert set(frequencies(temperature=1.0, **settings)) == allowed


def test_repetition_penalty_moves_the_greedy_choice() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), 0, entropy=0)
    assert sampler.sample(LOGITS, np.array([1], dtype=np.int32)) == 2
    assert torch.equal(LOGITS, torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0]))


def test_seed_and_choice_decide_the_draws() -> None:
    def draw(seed: int | None, choice: int, entropy: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=3.0, seed=seed), choice, entropy=entropy)
        return [sampler.sample(LOGITS, NOTHING_SEEN) for _ in range(30)]

    assert draw(5, 0, 1) == draw(5, 0, 2) == draw(4, 1, 3)
    assert draw(5, 0, 1) != draw(6, 0, 1)
    assert draw(None, 0, 1) != draw(None, 0, 2)


def test_logprobs_are_those_of_the_model() -> None:
    entry = token_logprob(LOGITS, 2, 3)
    expected = LOGITS.log_softmax(-1)
    assert entry.logprob == pytest.approx(float(expected[2]))
    assert [token for token, _ in entry.top] == [1, 2, 0]
    assert token_logprob(LOGITS, 2, 100).top[-1][0] == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("seed", -3),
        ("stop", "x"),
        ("stop", ("",)),
        ("n", 0),
        ("logprobs", 101),
    ],
)
def test_bad_settings_name_field_and_value(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} must be"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_settings_are_given_once() -> None:
    with pytest.raises(InvalidRequest, match="not both"):
        sampling_params(SamplingParams(), {"n": 2})
    assert sampling_params(None, {}) == SamplingParams()
    assert sampling_params(None, {"n": 2}) == dataclasses.replace(SamplingParams(), n=2)
