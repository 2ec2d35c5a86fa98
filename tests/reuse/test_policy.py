"""The reuse policy: its limits, and what counts as exact."""

from __future__ import annotations

import numpy as np
import pytest

from kvcomm.align.bound import Bound
from kvcomm.align.ladder import CORRECTED, DEFAULT_RUNGS, TURNED, Rung
from kvcomm.align.standings import Level
from kvcomm.errors import InvalidRequest
from kvcomm.reuse.policy import ReusePolicy


def test_exact_is_the_default() -> None:
    assert ReusePolicy.exact() == ReusePolicy() == ReusePolicy(max_divergence=0.0, confidence=0.95)
    assert ReusePolicy.exact().is_exact
    assert ReusePolicy.exact().bound is None
    assert not ReusePolicy(max_divergence=1e-9).is_exact
    assert ReusePolicy(max_divergence=0.5, confidence=0.75).bound == Bound(0.5, 0.25)


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
        ("rungs", (0.0, 0.3)),
        ("rungs", ()),
        ("basis", 3),
        ("basis", "hearsay"),
        ("learn", 1),
        ("audit", "often"),
        ("audit", 1.01),
        ("heal", 1),
        ("heal_within", 0),
        ("heal_within", 2.5),
        ("heal_within", True),
        ("heal_within", "soon"),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} must be"):
        ReusePolicy(**{field: value})  # type: ignore[arg-type]


def test_numbers_are_taken_as_what_they_say() -> None:
    policy = ReusePolicy(max_divergence=np.float32(0.5), rungs=[Rung("rotate")], audit=1)  # type: ignore[arg-type]
    assert policy == ReusePolicy(max_divergence=0.5, rungs=(Rung("rotate"),), audit=1.0)
    assert type(policy.max_divergence) is float


@pytest.mark.parametrize(
    ("rungs", "message"),
    [
        ((Rung("token", 0.1), Rung("token", 0.3)), "safest to the boldest, got token 10 % attention, token 30 %"),
        ((Rung("rotate"), Rung("token", 1.0), Rung("token")), r"a share below 1 \(all is exact\), got token 100 %"),
        ((Rung("token", 0.3, "head"), Rung("token", 0.1)), "rungs of one estimator have one chooser"),
    ],
)
def test_rungs_that_are_no_ladder_are_refused(rungs: tuple[Rung, ...], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        ReusePolicy(rungs=rungs)


def test_rungs_of_several_estimators_are_ladders_of_their_own() -> None:
    assert ReusePolicy().ladders == (CORRECTED, TURNED)
    mixed = [rung for pair in zip(CORRECTED, TURNED, strict=False) for rung in pair]
    rest = [rung for rung in DEFAULT_RUNGS if rung not in mixed]
    assert ReusePolicy(rungs=(*mixed, *rest)).ladders == (CORRECTED, TURNED)
    assert ReusePolicy(rungs=(Rung("rotate", 0.3, "head"), Rung("rotate"))).ladders[0][0].chooser == "head"


def test_the_basis_is_the_least_that_is_accepted() -> None:
    levels = {basis: ReusePolicy(basis=basis).levels for basis in ("own", "pool", "prior")}
    assert levels == {
        "own": (Level.OWN,),
        "pool": (Level.OWN, Level.POOL),
        "prior": (Level.OWN, Level.POOL, Level.PRIOR),
    }
    assert ReusePolicy().basis == "prior"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 1.5}, "share must be between 0 and 1, got 1.5"),
        ({"share": float("nan")}, "share must be between 0 and 1, got nan"),
        ({"share": "half"}, "share must be a number, not"),
        ({"share": True}, "share must be a number, not"),
        ({"estimator": 3}, "estimator must be"),
        ({"chooser": None}, "chooser must be"),
    ],
)
def test_rungs_of_the_wrong_type_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Rung(**wrong)  # type: ignore[arg-type]
