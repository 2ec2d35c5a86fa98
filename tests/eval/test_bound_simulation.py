"""The bound while traffic changes: the watch keeps it where a fixed delta does not, and costs little else."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from eval.bound_simulation import ADVERSARY, EPSILON, TRAFFIC, Served, Serving, figures_of, main, simulate, spiteful
from kvcomm.align.bound import Bound
from kvcomm.align.intervals import violation_limit
from kvcomm.align.watch import MAX_DEBT

DELTA = 0.1
BOUND = Bound(EPSILON, DELTA)


def worst_excess(served: Served) -> float:
    """Violations beyond delta of the requests, of the stretch in which there are most."""
    excess = np.concatenate(([0.0], np.cumsum(served.violated - DELTA)))
    return float((excess - np.minimum.accumulate(excess)).max())


@pytest.mark.parametrize("name", ["stationary", "sudden", "drifting", "alternating", "mixed_reader", ADVERSARY])
def test_every_stretch_of_requests_keeps_the_bound_of_the_watch(name: str) -> None:
    """One reader, every accepted request audited at once; its own level and the pool are watched over apart."""
    for seed in range(3):
        served = simulate(name, Serving(BOUND), 400, seed)
        assert worst_excess(served) <= 2 * (MAX_DEBT + 1)


@pytest.mark.parametrize("name", ["sudden", "drifting", "mixed_reader"])
def test_behind_a_shift_violations_come_back_to_delta(name: str) -> None:
    runs = [simulate(name, Serving(BOUND), 800, seed) for seed in range(6)]
    late = np.stack([run.violated[400:] for run in runs])
    assert late.mean() <= DELTA
    accepted = np.concatenate([run.accepted[640:] for run in runs])
    violated = np.concatenate([run.violated[640:] for run in runs])
    assert violated.sum() / max(1, accepted.sum()) <= violation_limit(DELTA, int(accepted.sum()))


def test_a_fixed_delta_breaks_the_bound_behind_a_shift_and_the_watch_does_not() -> None:
    shares = {}
    for watched in (False, True):
        behind = [simulate("sudden", Serving(BOUND, watched), 800, seed).violated[400:560] for seed in range(6)]
        shares[watched] = float(np.mean(behind))
    limit = violation_limit(DELTA, 6 * 160)
    assert shares[True] <= limit < shares[False]


def test_where_nothing_changes_the_watch_costs_little() -> None:
    accepted = {
        watched: np.mean([simulate("stationary", Serving(BOUND, watched), 400, seed).accepted for seed in range(6)])
        for watched in (False, True)
    }
    assert accepted[True] >= 0.93 * accepted[False] > 0.85


def test_whoever_breaks_the_bound_at_the_boldest_rung_gets_delta_of_requests() -> None:
    served = simulate(ADVERSARY, Serving(BOUND), 800, 0)
    assert served.violated.any()
    assert worst_excess(served) <= 2 * (MAX_DEBT + 1)


def test_few_audits_that_are_heard_of_late_find_a_shift_too() -> None:
    """Audits hear of one in fifty: that takes some hundred requests, and then the bound comes back."""
    count, rate = 6000, 0.05
    shares = {
        watched: np.mean(
            [simulate("sudden", Serving(BOUND, watched, rate, 20), count, s).violated[4000:] for s in (1, 2)]
        )
        for watched in (False, True)
    }
    assert shares[True] <= DELTA + 2 * math.sqrt(DELTA * (1 - DELTA) / (rate * 2 * 2000))


def test_many_young_readers_keep_the_bound_from_the_first_request_on() -> None:
    runs = [simulate("many_readers", Serving(BOUND, True, 0.02, 20), 400, seed) for seed in range(4)]
    accepted = np.stack([run.accepted for run in runs])
    violated = np.stack([run.violated for run in runs])
    assert accepted[:, :100].mean() > 0.8
    assert violated.sum() / accepted.sum() <= violation_limit(DELTA, int(accepted.sum()))


def test_runs_with_one_seed_are_alike() -> None:
    for name in TRAFFIC:
        one, other = (simulate(name, Serving(BOUND, True, 0.1, 5), 60, 3) for _ in range(2))
        assert (one.accepted == other.accepted).all()
        assert (one.violated == other.violated).all()


def test_the_adversary_breaks_the_bound_where_the_boldest_is_served() -> None:
    assert (spiteful(2) > EPSILON).tolist() == [False, False, True]
    for index in (None, 0, 1):
        assert not (spiteful(index) > EPSILON).any()


def test_figures_of_stretches() -> None:
    accepted = np.array([False] * 5 + [True] * 5)
    violated = np.array([False] * 5 + [True, False, True, False, False])
    told = {figure.id: figure.value for figure in figures_of("x", [Served(accepted, violated)], DELTA)}
    assert told["x_violations_before"] == 0
    assert told["x_violations_behind"] == 0.5
    assert told["x_violations_end"] == 0
    assert told["x_violations_all"] == 0.4
    assert told["x_violations_of_all"] == 0.2
    assert (told["x_accepted_before"], told["x_accepted_behind"], told["x_accepted_all"]) == (0, 1, 0.5)


def test_it_prints_a_table_and_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--requests", "20", "--runs", "1"]) == 0
    assert "sudden few watched" in capsys.readouterr().out
    assert main(["--requests", "20", "--runs", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {figure["id"] for figure in told["figures"]} >= {"sudden_all_fixed_violations_behind"}
    assert told["config"]["runs"] == 1


@pytest.mark.parametrize("arguments", [["--requests", "5"], ["--runs", "0"], ["--delta", "0"], ["--delta", "1"]])
def test_settings_that_make_no_sense_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "error" in capsys.readouterr().err
