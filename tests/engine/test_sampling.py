"""What is drawn, against closed forms and frequencies; and what is refused."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from kvcomm.engine.sampler import Sampler, token_logprob
from kvcomm.engine.sampling import SamplingParams, sampling_params
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
        ("top_k", -2),
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


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-12])
@pytest.mark.parametrize("others", [{}, {"top_p": 0.9, "top_k": 3, "min_p": 0.1}])
def test_tiny_temperatures_are_greedy(temperature: float, others: dict[str, object]) -> None:
    assert set(frequencies(50, temperature=temperature, **others)) == {1}


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e-40, 1e-12, 1e12, 1e300, 1e308])
@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1.0, 1e300])
def test_penalties_of_any_size_never_leave_the_numbers(penalty: float, temperature: float) -> None:
    """A tiny penalty lifts the best of the seen tokens above all others; a huge one forbids seen tokens."""
    sampler = Sampler(SamplingParams(repetition_penalty=penalty, temperature=temperature, seed=1), 0, entropy=0)
    draws = {sampler.sample(LOGITS, np.array([2, 4], dtype=np.int32)) for _ in range(20)}
    if temperature < 1:
        assert draws == ({2} if penalty < 1 else {1})
    else:
        assert draws <= set(range(len(LOGITS)))


def test_hidden_tokens_stay_hidden_at_any_temperature() -> None:
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 1.5])
    for temperature in (5e-324, 0.5, 1.0, 1e300):
        sampler = Sampler(SamplingParams(temperature=temperature), 0, entropy=5)
        assert {sampler.sample(logits, NOTHING_SEEN) for _ in range(50)} <= {1, 3}


def test_the_last_draw_is_of_a_possible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A uniform number next to 1 times the mass may round up to all of it."""
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(1.0, dtype=torch.float64))
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=2), 0, entropy=0)
    assert sampler.sample(LOGITS, NOTHING_SEEN) == 2


@pytest.mark.parametrize(
    ("field", "given", "meant"),
    [
        ("temperature", 2, 2.0),
        ("temperature", np.float32(0.5), 0.5),
        ("repetition_penalty", 2, 2.0),
        ("top_p", 1, 1.0),
        ("min_p", np.float64(0.25), 0.25),
        ("top_k", np.int64(5), 5),
        ("top_k", -1, 0),
        ("max_new_tokens", np.uint16(7), 7),
        ("seed", np.int64(3), 3),
        ("n", np.int32(2), 2),
        ("logprobs", np.int8(4), 4),
        ("ignore_eos", np.True_, True),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop_token_ids", [np.int64(4), 5], (4, 5)),
        ("stop_token_ids", np.array([4, 5]), (4, 5)),
    ],
)
def test_numbers_are_taken_as_what_they_say(field: str, given: object, meant: object) -> None:
    params = sampling_params(None, {field: given})
    found = getattr(params, field)
    assert (found, type(found)) == (meant, type(meant))
    assert params == sampling_params(None, {field: meant})
    hash(params)
    Sampler(params, 0, entropy=0).sample(LOGITS, NOTHING_SEEN)


WRONG_TYPES: dict[str, tuple[object, ...]] = {
    "max_new_tokens": (2.0, True, None, "3", [3]),
    "temperature": ("0.5", None, True, [1.0], 1j),
    "top_k": (True, 1.5, None, "5"),
    "top_p": ("1", None, False),
    "min_p": ("0", None, True),
    "repetition_penalty": ("1", None, True),
    "seed": (True, 1.0, "1"),
    "stop": ("abc", (b"a",), (1,), None, 5, {"a": 1}, ("a\ud800",), (None,)),
    "stop_token_ids": (5, None, "abc", (1.0,), ("a",), (True,), {1, 2}, b"ab", [[1]]),
    "ignore_eos": (1, 0, None, "yes"),
    "n": (True, 2.0, None, "2"),
    "logprobs": (True, 2.0, "2"),
    "skip_special_tokens": (1, 0, None, "yes"),
    "frequency_penalty": ("1", None, True),
    "presence_penalty": ("1", None, True),
    "logit_bias": (5, None, "abc", [1], {1.5: 1.0}, {1: "x"}, {1: None}, {True: 1.0}),
    "min_tokens": (2.0, True, None, "3"),
    "prompt_logprobs": (True, 2.0, "2"),
    "grammar": ("a", {"type": "object"}, True, 5),
}


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, wrong in WRONG_TYPES.items() for value in wrong])
def test_values_of_the_wrong_type_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}.* must be |^{field}.* holds the lone surrogate"):
        sampling_params(None, {field: value})


def test_every_field_is_covered_here() -> None:
    assert WRONG_TYPES.keys() == SamplingParams.__dataclass_fields__.keys()


def test_what_is_no_sampling_is_refused() -> None:
    for wrong in (5, {"n": 2}, "greedy"):
        with pytest.raises(InvalidRequest, match="sampling must be a SamplingParams"):
            sampling_params(wrong, {})  # type: ignore[arg-type]
