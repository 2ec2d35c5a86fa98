"""What is chosen among outcomes, by hand."""

from __future__ import annotations

import pytest

from kvcomm.agents.tuning import search
from kvcomm.config import EngineConfig
from kvcomm.reuse.decision import Rungs
from kvcomm.reuse.replay import Outcome


def prompt(token: dict[float, float], rotate: float = 1.0) -> Rungs:
    """Token divergences by share, the last one for all shares above; everything else as far off as `rotate`."""
    outcomes = []
    for variant in search.BASE:
        known = [value for share, value in sorted(token.items()) if share <= variant.share]
        nats = known[-1] if variant in search.TOKEN else rotate
        outcomes.append(Outcome(nats, 1 - nats, 0.1, 0.1 if variant.share else None, int(100 * variant.share)))
    return Rungs(100, outcomes)


def test_the_ladder_begins_at_the_cheapest_share_that_keeps_the_bound_with_all_costlier_ones() -> None:
    measured = {
        "cheap": [prompt({0: 0.01})] * 4,
        "dear": [prompt({0: 0.9, 0.3: 0.01})] * 4,
        "uneven": [prompt({0: 0.01, 0.3: 0.9, 0.5: 0.01})] * 4,  # a cheaper share that holds by chance is no rung
        "never": [prompt({0: 0.9})] * 4,
    }
    ladder = search.best_ladder(measured, search.BASE, (0.02, 0.05))
    assert ladder.estimator == "token"
    assert ladder.served == {"cheap": 0.0, "dear": 0.3, "uneven": 0.5, "never": None}
    assert ladder.rungs == (0.0, 0.05, 0.3, 0.5, 0.7, 0.85)
    assert ladder.computed == pytest.approx((0 + 0.3 + 0.5 + 1) / 4)


def test_a_share_delta_of_prompts_may_violate() -> None:
    good, bad = prompt({0: 0.01}), prompt({0: 0.9, 0.5: 0.01})
    for num_bad, served in ((1, 0.0), (2, 0.5)):
        measured = {"a": [good] * (20 - num_bad) + [bad] * num_bad}
        assert search.choose_ladder(measured, search.BASE, "token", (0.02, 0.05)).served == {"a": served}


def test_rotation_alone_is_chosen_where_it_computes_less() -> None:
    measured = {"a": [prompt({0: 0.9}, rotate=0.01)] * 4}
    assert search.best_ladder(measured, search.BASE, (0.02, 0.05)).estimator == "rotate"


def test_of_two_that_compute_alike_the_one_nearer_at_the_same_shares_is_chosen() -> None:
    """Bug: the corrected one was also averaged over larger shares, at which rotation is not measured."""
    measured = {"a": [prompt({0: 0.019, 0.7: 0.0}, rotate=0.018)] * 4}
    assert search.best_ladder(measured, search.BASE, (0.02, 0.05)).estimator == "rotate"


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
