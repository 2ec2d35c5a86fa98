"""The reuse policy: its limits, and what counts as exact."""

from __future__ import annotations

import numpy as np
import pytest

from kvcomm.errors import InvalidRequest
from kvcomm.reuse.policy import ReusePolicy


def test_exact_is_the_default() -> None:
    assert ReusePolicy.exact() == ReusePolicy() == ReusePolicy(max_divergence=0.0, confidence=0.95)
    assert ReusePolicy.exact().is_exact
    assert not ReusePolicy(max_divergence=1e-9).is_exact


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_divergence_must_be_finite_and_not_negative(value: float) -> None:
    with pytest.raises(InvalidRequest, match=f"max_divergence must be .* got {value!r}"):
        ReusePolicy(max_divergence=value)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, float("nan")])
def test_confidence_must_be_a_probability_short_of_certainty(value: float) -> None:
    with pytest.raises(InvalidRequest, match=f"confidence must be .* got {value!r}"):
        ReusePolicy(confidence=value)
    assert ReusePolicy(confidence=0.999).confidence == 0.999


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_divergence", "0.1"),
        ("max_divergence", True),
        ("confidence", None),
        ("confidence", 10**400),
        ("rungs", 0.5),
        ("rungs", "abc"),
        ("rungs", (0.0, "x")),
        ("learn", 1),
        ("audit", "often"),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} must be"):
        ReusePolicy(**{field: value})  # type: ignore[arg-type]


def test_numbers_are_taken_as_what_they_say() -> None:
    policy = ReusePolicy(max_divergence=np.float32(0.5), rungs=[0, np.float64(0.5)], audit=1)  # type: ignore[arg-type]
    assert policy == ReusePolicy(max_divergence=0.5, rungs=(0.0, 0.5), audit=1.0)
    assert [type(share) for share in policy.rungs] == [float, float]
