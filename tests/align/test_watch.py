"""The watch: what it allows in the long run, whatever the outcomes, and what it is told about what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.align.bound import Bound
from kvcomm.align.watch import MAX_DEBT, Watch

KEPT, BROKEN = 0.01, 0.09
deltas = st.sampled_from([0.01, 0.05, 1 - 0.95, 0.1, 0.3, 0.5, 0.8])


def watch(delta: float = 0.1, within: Watch | None = None) -> Watch:
    return Watch(Bound(0.05, delta), within)


def run(found: Watch, outcomes: Sequence[bool]) -> list[bool]:
    """Serve requests that would break the bound or not; returns which accepted ones did.

    What is not accepted is computed exactly, and measured.
    """
    broken = []
    for breaks in outcomes:
        is_accepted = found.working_delta > 0
        broken.append(is_accepted and breaks)
        (found.audited if is_accepted else found.would_give)(BROKEN if breaks else KEPT)
    return broken


def windows_hold(broken: Sequence[bool], delta: float) -> bool:
    """Whether the bound of the module's docstring holds of every stretch of requests."""
    excess = np.concatenate(([0.0], np.cumsum(np.array(broken) - delta)))
    return bool((excess - np.minimum.accumulate(excess)).max() <= MAX_DEBT + 1)


@given(deltas, st.lists(st.booleans(), max_size=300))
def test_violations_are_bounded_whatever_happens(delta: float, outcomes: list[bool]) -> None:
    assert windows_hold(run(watch(delta), outcomes), delta)


@given(deltas, st.lists(st.tuples(st.booleans(), st.integers(1, 60)), max_size=30))
def test_violations_are_bounded_when_times_are_long_and_change(delta: float, times: list[tuple[bool, int]]) -> None:
    assert windows_hold(run(watch(delta), [breaks for breaks, count in times for _ in range(count)]), delta)


@pytest.mark.parametrize("delta", [0.05, 0.1, 0.3])
def test_whoever_breaks_the_bound_whenever_something_is_accepted_does_so_in_delta_of_all_requests(delta: float) -> None:
    found, broken = watch(delta), []
    for _ in range(4000):
        is_accepted = found.working_delta > 0
        broken.append(is_accepted)
        (found.audited if is_accepted else found.would_give)(BROKEN if is_accepted else KEPT)
    assert windows_hold(broken, delta)
    assert sum(broken) / 4000 == pytest.approx(delta, abs=0.01)


@given(deltas, st.lists(st.tuples(st.booleans(), st.booleans()), max_size=200))
def test_the_working_delta_is_adaptive_conformal_inference(delta: float, told: list[tuple[bool, bool]]) -> None:
    """Step by step against the rule in fractions: gamma (delta - violated), between its ends."""
    exact = Fraction(delta)
    gamma, working, found = exact / Fraction(MAX_DEBT), exact, watch(delta)
    for is_audit, breaks in told:
        moved = min(exact, working + gamma * (exact - breaks))
        working = moved if is_audit else max(moved, min(working, -gamma))
        (found.audited if is_audit else found.would_give)(BROKEN if breaks else KEPT)
        assert found.working_delta == pytest.approx(float(working), abs=1e-8)
        assert found.working_delta <= delta


def test_after_one_violation_it_takes_as_many_good_outcomes_as_the_bound_says() -> None:
    found = watch(0.1)
    found.audited(BROKEN)
    assert found.working_delta == pytest.approx(0.055)
    for _ in range(8):
        found.audited(KEPT)
    assert found.working_delta < 0.1
    found.audited(KEPT)
    assert found.working_delta == 0.1


def test_a_bad_time_is_left_behind_as_quickly_however_long_it_was() -> None:
    needed = []
    for count in (3, 30, 3000):
        found = watch(0.1)
        run(found, [True] * count)
        good = 0
        while found.working_delta <= 0:
            found.would_give(KEPT)
            good += 1
        needed.append(good)
    assert needed[0] <= needed[1] == needed[2] <= (MAX_DEBT + 1 - MAX_DEBT) / 0.1 + 1


def test_late_audits_are_owed_in_full() -> None:
    """Ten requests were accepted before the first of them was heard of."""
    found = watch(0.1)
    for _ in range(10):
        found.audited(BROKEN)
    assert found.debt == pytest.approx(9)
    found.would_give(BROKEN)
    assert found.debt == pytest.approx(9)
    found.would_give(KEPT)
    assert found.debt == pytest.approx(8.9)


def test_a_share_of_audits_drawn_evenly_keeps_the_bound_on_average() -> None:
    """A reader whose rung at the caller's delta breaks the bound always and at less never."""
    generator = np.random.default_rng(3)
    found, num_broken = watch(0.1), 0
    for _ in range(200_000):
        breaks = found.working_delta == 0.1
        num_broken += breaks
        if generator.random() < 0.05:
            found.audited(BROKEN if breaks else KEPT)
    assert num_broken / 200_000 <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / (0.05 * 200_000))


def test_exactly_epsilon_keeps_the_bound_and_what_is_no_number_breaks_it() -> None:
    found = watch()
    assert not found.would_give(0.05)
    assert found.debt == 0
    assert found.would_give(math.nextafter(0.05, 1))
    assert found.would_give(math.nan)
    assert found.would_give(math.inf)


def test_the_breaker_hears_of_audits_alone() -> None:
    found = watch()
    for _ in range(50):
        found.would_give(BROKEN)
    assert found.breaker.num_observed == 0
    assert not found.is_tripped
    tripped = [found.audited(BROKEN) for _ in range(10)]
    assert sum(tripped) == 1
    assert found.is_tripped


def test_a_part_of_the_traffic_is_never_served_laxer_than_all_of_it() -> None:
    whole = watch()
    one, other = watch(within=whole), watch(within=whole)
    one.audited(BROKEN)
    assert one.working_delta == other.working_delta == whole.working_delta < 0.1
    for _ in range(9):
        other.would_give(KEPT)
    assert other.working_delta == whole.working_delta == 0.1
    assert one.working_delta == pytest.approx(0.055)


def test_a_part_that_trips_leaves_the_others_alone() -> None:
    whole = watch()
    bad, good = watch(within=whole), watch(within=whole)
    for _ in range(40):
        good.audited(KEPT)
    tripped = [bad.audited(BROKEN) for _ in range(4)]
    assert tripped[-1]
    assert bad.is_tripped
    assert not good.is_tripped
    assert not whole.is_tripped


def test_where_the_whole_trips_no_part_is_served() -> None:
    whole = watch()
    parts = [watch(within=whole) for _ in range(10)]
    trips = [part.audited(BROKEN) for part in parts]
    assert sum(trips) == 1
    assert all(part.is_tripped for part in parts)
    assert not any(part.breaker.tripped for part in parts)


def test_the_breaker_bounds_violations_among_accepted_requests_alone() -> None:
    """As long as it has not tripped: its evidence is at most 100, so that of its lowest rate at most 500."""
    generator = np.random.default_rng(8)
    for rate in (0.1, 0.13, 0.2, 0.6):
        found = watch(0.1)
        while not found.is_tripped and found.breaker.num_observed < 3000:
            found.audited(BROKEN if generator.random() < rate else KEPT)
        breaker = found.breaker
        limit = (math.log(500) - breaker.num_observed * math.log(0.85 / 0.9)) / math.log(0.15 / 0.1 * 0.9 / 0.85)
        assert breaker.num_violations <= limit + 1
