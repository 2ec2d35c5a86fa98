"""What is chosen among outcomes, by hand."""

from __future__ import annotations

import math

import pytest

from kvcomm.agents.tuning import search
from kvcomm.agents.tuning.replays import ReplayedPrompt
from kvcomm.align.bound import Bound
from kvcomm.align.ladder import Rung, ladders_of
from kvcomm.config import EngineConfig
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.replay import Outcome

STRICT = Bound(0.02, 0.05)


def prompt(token: dict[float, float], rotate: float = 1.0) -> ReplayedPrompt:
    """Token divergences by share, the last one for all shares above; everything else as far off as `rotate`."""
    outcomes = {}
    for rung in search.BASE:
        known = [value for share, value in sorted(token.items()) if share <= rung.share]
        nats = known[-1] if rung in search.TOKEN else rotate
        outcomes[rung] = Outcome(nats, 1 - nats, 0.1, 0.1 if rung.share else None, int(100 * rung.share))
    return ReplayedPrompt(100, outcomes)


def shares(choice: search.EstimatorChoice | None) -> list[float]:
    assert choice is not None
    return [rung.share for rung in choice.ladder]


def test_a_ladder_ends_at_the_cheapest_share_that_keeps_the_bound_with_all_costlier_ones() -> None:
    measured = {
        "cheap": [prompt({0: 0.01})] * 4,
        "dear": [prompt({0: 0.9, 0.3: 0.01})] * 4,
        "uneven": [prompt({0: 0.01, 0.3: 0.9, 0.4: 0.01})] * 4,  # a cheaper share that holds by chance is no rung
        "never": [prompt({0: 0.9})] * 4,
    }
    choice = search.choose_ladder(measured, search.TOKEN, STRICT)
    assert choice is not None
    assert choice.served == {"cheap": 0.0, "dear": 0.3, "uneven": 0.4, "never": None}
    assert shares(choice) == [0.7, 0.55, 0.4, 0.3, 0.05, 0.0]  # with the next safer one of each
    assert choice.computed == pytest.approx((0 + 0.3 + 0.4 + 1) / 4)


def test_a_share_delta_of_prompts_may_violate() -> None:
    good, bad = prompt({0: 0.01}), prompt({0: 0.9, 0.55: 0.01})
    for num_bad, served in ((1, 0.0), (2, 0.55)):
        measured = {"a": [good] * (20 - num_bad) + [bad] * num_bad}
        choice = search.choose_ladder(measured, search.TOKEN, STRICT)
        assert choice is not None
        assert choice.served == {"a": served}


def test_both_ladders_are_chosen_the_one_first_that_computes_less() -> None:
    for token, rotate, names in ((0.01, 0.9, ["token", "rotate"]), (0.9, 0.01, ["rotate", "token"])):
        rungs = search.choose_rungs({"a": [prompt({0: token}, rotate)] * 4}, search.BASE, STRICT)
        assert [ladder[0].estimator for ladder in ladders_of(rungs)] == names
        assert ReusePolicy(*STRICT, rungs=rungs).rungs == rungs


def test_without_anchors_only_the_ladder_that_needs_none_is_chosen() -> None:
    """Of edges with too few anchors nothing is known; prompts on others still count."""
    free = ReplayedPrompt(
        100, {rung: each for rung, each in prompt({0: 0.01}, 0.01).outcomes.items() if rung in search.ROTATE}
    )
    rungs = search.choose_rungs({"a": [free] * 4}, search.BASE, STRICT)
    assert rungs == (Rung("rotate", 0.1), Rung("rotate", 0.0))
    mixed = search.choose_rungs({"a": [free] * 4, "b": [prompt({0: 0.01}, 0.01)]}, search.BASE, STRICT)
    assert {rung.estimator for rung in mixed} == {"token", "rotate"}
    assert search.score({"a": [free]}, search.PROBED) == math.inf


def test_the_front_is_what_nothing_beats_in_both() -> None:
    points = [search.Point(name, *at, 1.0) for name, at in {"a": (0.5, 0.1), "b": (0.0, 0.4), "c": (0.6, 0.2)}.items()]
    points.append(search.Point("d", 0.5, 0.3, 1.0))
    assert [(point.setting, point.on_front) for point in search.mark_front(points)] == [
        ("b", True),
        ("a", True),
        ("d", False),
        ("c", False),
    ]


def test_every_axis_changes_one_setting() -> None:
    config = EngineConfig()
    labels = [[each.label for each in search.candidates(config, axis, 3)] for axis in range(search.num_axes(3))]
    assert labels == [
        ["k=4", "k=16"],
        ["alpha=[0.8, 1.0, 1.0]"],
        ["alpha=[1.0, 0.8, 1.0]"],
        ["alpha=[1.0, 1.0, 0.8]"],
        ["sketch_layers=2", "sketch_layers=10"],
    ]
