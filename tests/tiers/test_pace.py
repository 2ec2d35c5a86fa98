"""What a tier costs and whether it is worth asking, on a clock of the tests' own."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvcomm.tiers.pace import FIRST_REST_S, MAX_REST_S, SMALL_BYTES, WORTH_SHARE, Pace

MB = 10**6


class Clock:
    """Seconds that only tests move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_cost_is_a_latency_and_so_much_a_byte() -> None:
    pace = Pace(Clock())
    assert pace.expected_s(MB) is None
    pace.done(100, 0.01)
    pace.done(10 * MB, 0.11)
    assert pace.expected_s(0) == pytest.approx(0.01)
    assert pace.expected_s(10 * MB) == pytest.approx(0.11)
    assert pace.expected_s(40 * MB) == pytest.approx(0.41)


def test_nothing_is_known_at_first_and_one_may_try() -> None:
    assert Pace(Clock()).is_worth(MB, 0.0)


def test_worth_is_clearly_less_than_computing() -> None:
    pace = Pace(Clock())
    pace.done(MB, 1.0)
    assert pace.is_worth(MB, 1.0 / WORTH_SHARE + 1e-6)
    assert not pace.is_worth(MB, 1.0)
    assert not pace.is_worth(2 * MB, 1.5)


def test_a_tier_that_has_become_slow_is_left_alone_after_one_operation() -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(20):
        pace.done(10 * MB, 0.1)
    pace.done(10 * MB, 10.0)
    assert pace.expected_s(10 * MB) == pytest.approx(10.0)
    assert not pace.is_worth(10 * MB, 2.0)


def test_a_late_read_counts_before_it_ends() -> None:
    pace = Pace(Clock())
    pace.done(10 * MB, 0.1)
    pace.late(10 * MB, 1.5)
    assert pace.expected_s(10 * MB) == pytest.approx(1.5)
    pace.late(10 * MB, 0.5)  # no news
    assert pace.expected_s(10 * MB) == pytest.approx(1.5)


def test_single_probes_after_rests_that_grow_until_one_is_good() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.failed()
    assert not pace.is_worth(MB, 1.0)
    rests = []
    for _ in range(10):
        before = clock.now
        while not pace.is_worth(MB, 1.0):
            clock.now += FIRST_REST_S / 2
        assert not pace.is_worth(MB, 1.0)  # others wait
        pace.failed()
        rests.append(clock.now - before)
    assert rests == sorted(rests)
    assert rests[-1] == MAX_REST_S
    clock.now += MAX_REST_S
    assert pace.is_worth(MB, 1.0)
    pace.done(MB, 0.01)
    assert pace.is_worth(MB, 1.0)
    assert pace.is_worth(MB, 1.0)


def test_a_latency_that_was_long_once_is_forgotten_by_a_fast_read() -> None:
    pace = Pace(Clock())
    pace.done(100, 0.001)
    pace.late(100, 30.0)
    pace.done(10 * MB, 0.1)
    assert pace.expected_s(10 * MB) == pytest.approx(0.1)


def test_noise_moves_it_little() -> None:
    pace = Pace(Clock())
    for seconds in (0.1, 0.12, 0.08, 0.1, 0.13) * 10:
        pace.done(MB, seconds)
    expected_s = pace.expected_s(MB)
    assert expected_s is not None
    assert 0.08 < expected_s < 0.13


DURATIONS = st.just(0.0) | st.floats(1e-9, 1000)
"""Seconds, to the nanosecond as clocks tell them: what is less has too few digits left to be divided by bytes."""


class PaceMachine(RuleBasedStateMachine):
    """However it is used: no more than one caller a rest is sent to a tier that is not worth it."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.pace = Pace(self.clock)
        self.probed_s: float | None = None

    @rule(seconds=st.floats(0, 100))
    def waits(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(num_bytes=st.integers(0, 10**9), seconds=DURATIONS)
    def done(self, num_bytes: int, seconds: float) -> None:
        self.pace.done(num_bytes, seconds)
        assert not self.pace.is_failing

    @rule(num_bytes=st.integers(0, 10**9), seconds=DURATIONS)
    def late(self, num_bytes: int, seconds: float) -> None:
        self.pace.late(num_bytes, seconds)
        expected_s = self.pace.expected_s(num_bytes)
        assert expected_s is None or expected_s >= seconds * (1 - 1e-9)

    @rule()
    def failed(self) -> None:
        self.pace.failed()
        assert self.pace.expected_s(1) == math.inf

    @rule(num_bytes=st.integers(0, 10**9), compute_s=st.floats(0, 1000))
    def asked(self, num_bytes: int, compute_s: float) -> None:
        expected_s = self.pace.expected_s(num_bytes)
        is_cheap = expected_s is None or expected_s <= WORTH_SHARE * compute_s
        is_worth = self.pace.is_worth(num_bytes, compute_s)
        assert is_worth or not is_cheap
        if is_cheap:
            self.probed_s = None
        elif is_worth:
            assert self.probed_s is None or self.clock.now - self.probed_s >= FIRST_REST_S
            self.probed_s = self.clock.now

    @invariant()
    def costs_are_numbers(self) -> None:
        assert 0 <= self.pace.latency_s < math.inf
        assert 0 <= self.pace.byte_s < math.inf
        small, large = self.pace.expected_s(SMALL_BYTES), self.pace.expected_s(10**9)
        assert small is None or large is None or small <= large


TestPaceMachine = PaceMachine.TestCase
TestPaceMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
