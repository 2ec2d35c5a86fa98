"""A history against a plain list of what was counted when."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcomm.server.history import MINUTE_STEPS, NUM_STEPS, STEP_S, History

WHOLE_S = NUM_STEPS * STEP_S


class Clock:
    """A clock that stands still between a test's moves; binary fractions, so that sums are exact."""

    def __init__(self) -> None:
        self.now_s = 1024.0

    def __call__(self) -> float:
        return self.now_s


Moves = st.lists(st.tuples(st.integers(0, int(1.5 * WHOLE_S) * 8), st.sampled_from("ab"), st.integers(1, 9)))


@given(Moves)
def test_sums_are_those_of_a_list(moves: list[tuple[int, str, int]]) -> None:
    clock = Clock()
    history, known = History(clock), list[tuple[int, str, int]]()
    for eighths, name, number in moves:
        clock.now_s += eighths / 8
        history.add({name: number})
        known.append((int((clock.now_s - 1024) // STEP_S), name, number))
        newest = known[-1][0]
        for name in "ab":
            steps = range(newest - NUM_STEPS + 1, newest + 1)
            expected = [sum(value for step, what, value in known if (step, what) == (at, name)) for at in steps]
            assert history.curve(name) == expected
            assert history.last_minute(name) == sum(expected[-MINUTE_STEPS:])


def test_the_last_minute_is_what_its_sums_are_over() -> None:
    clock = Clock()
    history = History(clock)
    for elapsed_s, expected_s in ((0, 0), (7, 7), (59, 59), (60, 50), (69, 59), (7205, 55)):
        clock.now_s = 1024.0 + elapsed_s
        assert history.minute_s == expected_s


def test_what_is_kept_is_bounded() -> None:
    clock = Clock()
    history = History(clock)
    for _ in range(3 * NUM_STEPS):
        clock.now_s += STEP_S
        history.add({"a": 1})
    assert history.curve("a") == [1] * NUM_STEPS
    clock.now_s += 1e9
    assert history.curve("a") == [0] * NUM_STEPS
