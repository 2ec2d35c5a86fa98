"""What is spare beside answers: never more than their share, whatever passes turn out to take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.engine.spare import FAST, MANY_ANSWERS, MAX_ROWS, MIN_CHUNK, USUAL_CHUNK, Spare


def made(share: float = 0.1) -> Spare:
    """With a prompt seen of 2 ms a row, and answers of 50 ms a pass, beside which something waits."""
    spare = Spare(share)
    spare.passed(0, 100, 0, 0.2, is_wanted=True)
    spare.passed(1, 0, 0, 0.05, is_wanted=True)
    return spare


def test_nothing_is_spare_before_anything_was_measured() -> None:
    assert Spare(0.1).num_rows(1) == 0


def test_where_no_prompt_has_told_what_a_row_takes_the_smallest_chunk_does() -> None:
    spare = Spare(0.1)
    spare.passed(1, 0, 0, 0.05, is_wanted=True)
    assert spare.num_rows(1) == MIN_CHUNK
    spare.passed(1, 0, MIN_CHUNK, 0.05 + MIN_CHUNK * 0.002, is_wanted=True)
    assert spare.num_rows(1) == 0
    while spare.saved_s < 0.1:
        spare.passed(1, 0, 0, 0.05, is_wanted=True)
    assert spare.num_rows(1) == pytest.approx(0.1 / 0.002, abs=3)


def test_rows_that_seem_to_take_no_time_are_still_bounded() -> None:
    """A pass may happen to be quicker with more rows than without; no clock may end an engine."""
    spare = Spare(0.1)
    for _ in range(5):
        spare.passed(1, 0, 0, 0.05, is_wanted=True)
        spare.passed(1, 0, MIN_CHUNK, 0.05, is_wanted=True)
    assert spare.num_rows(1) == MAX_ROWS
    spare.passed(1, 0, MAX_ROWS, 5.0, is_wanted=True)
    assert spare.num_rows(1) == 0
    for seconds in (0.0, 0.0):
        spare.passed(1, 0, 0, seconds, is_wanted=True)
        spare.passed(0, 100, 0, seconds, is_wanted=True)
    assert 0 <= spare.num_rows(1) <= MAX_ROWS


def test_rows_are_earned_by_answers_and_paid_for() -> None:
    spare = made()
    for _ in range(19):
        spare.passed(1, 0, 0, 0.05, is_wanted=True)
    assert spare.saved_s == pytest.approx(0.1)
    assert spare.num_rows(1) in (49, 50)
    spare.passed(1, 0, 45, 0.05 + 0.09, is_wanted=True)
    assert spare.saved_s == pytest.approx(0.1 + 0.005 - 0.09)


def test_nothing_is_earned_while_nothing_waits() -> None:
    """Else the answers that are followed would pay for those that are not."""
    spare = made()
    for _ in range(100):
        spare.passed(1, 0, 0, 0.05, is_wanted=False)
    assert spare.saved_s == 0.0
    spare.passed(1, 0, 30, 0.2, is_wanted=True)
    debt = spare.saved_s
    spare.passed(1, 0, 0, 0.05, is_wanted=False)
    assert spare.saved_s == debt < 0


def test_rows_that_turn_out_dearer_are_fewer() -> None:
    cheap, dear = made(), made()
    for spare, seconds in ((cheap, 0.06), (dear, 0.25)):
        for _ in range(20):
            spare.passed(1, 0, 10, seconds, is_wanted=True)
        spare.saved_s = 0.1
    assert dear.num_rows(1) < cheap.num_rows(1)


def test_under_load_nothing_is_done_beside_answers_that_takes_longer_there() -> None:
    alike, dear = made(), made()
    for spare, row_s in ((alike, 0.002), (dear, 0.0028)):
        for _ in range(20):
            spare.passed(4, 0, 10, 0.05 + 10 * row_s, is_wanted=True)
        spare.saved_s = 0.1
    assert alike.num_rows(4, MANY_ANSWERS) > 0
    assert dear.num_rows(4, MANY_ANSWERS) == 0
    assert dear.num_rows(4, MANY_ANSWERS - 1) > 0


def test_a_share_of_nothing_leaves_nothing() -> None:
    assert made(0.0).num_rows(1) == 0


def test_what_is_earned_is_not_saved_for_ever() -> None:
    spare = made()
    for _ in range(10_000):
        spare.passed(1, 0, 0, 0.05, is_wanted=True)
    assert spare.num_rows(1) == MAX_ROWS
    assert spare.saved_s == pytest.approx(MAX_ROWS * 0.002)


@given(
    share=st.floats(0.01, 0.5),
    passes=st.lists(st.tuples(st.floats(0.01, 0.2), st.floats(0, 0.02)), min_size=1, max_size=200),
)
def test_answers_are_slowed_by_no_more_than_the_share(share: float, passes: list[tuple[float, float]]) -> None:
    """Whatever a row takes: in the long run; one pass may take more than was foreseen."""
    spare = made(share)
    answers_s = extra_s = largest_s = 0.0
    for pace_s, row_s in passes:
        spare.passed(1, 0, 0, pace_s, is_wanted=True)
        answers_s += pace_s
        num_rows = spare.num_rows(1)
        if num_rows:
            # Held against the pace as it is known, which is what the spare time is counted in.
            known_s = spare._pace_s(1)
            assert known_s is not None
            answers_s += known_s
            largest_s = max(largest_s, num_rows * row_s)
            extra_s += num_rows * row_s
            spare.passed(1, 0, num_rows, known_s + num_rows * row_s, is_wanted=True)
    assert extra_s <= share * (answers_s + 0.05) + largest_s + 1e-9


def beside(spare: Spare, num_rows: int, extra_s: float) -> None:
    spare.passed(1, 0, num_rows, 0.05 + extra_s, is_wanted=True)


def test_a_pass_with_other_rows_costs_something_whatever_their_number() -> None:
    """Bug: chunks of 16 took 1.7 times as long by the row as those of 96, and were taken as soon as one was earned."""
    spare = Spare(0.1)
    spare.passed(1, 0, 0, 0.05, is_wanted=True)
    assert spare.chunk == MIN_CHUNK
    beside(spare, MIN_CHUNK, 0.04 + 0.002 * MIN_CHUNK)
    assert spare.chunk == USUAL_CHUNK
    for _ in range(10):
        beside(spare, MIN_CHUNK, 0.04 + 0.002 * MIN_CHUNK)
        beside(spare, USUAL_CHUNK, 0.04 + 0.002 * USUAL_CHUNK)
    assert spare.chunk == pytest.approx(0.04 / (0.3 * 0.002), abs=1)
    spare.saved_s = 0.04 + 0.002 * 30
    assert spare.num_rows(1) in (29, 30)
    spare.saved_s = 0.039
    assert spare.num_rows(1) == 0


@pytest.mark.parametrize(("pass_s", "expected"), [(0.0, MIN_CHUNK), (1.0, MAX_ROWS)])
def test_a_chunk_that_is_worth_waiting_for_has_limits(pass_s: float, expected: int) -> None:
    spare = made()
    for num_rows in (16, 32) * 10:
        beside(spare, num_rows, pass_s + 0.002 * num_rows)
    assert spare.chunk == expected


def test_where_guesses_make_answers_fast_the_share_is_of_the_time_without_them() -> None:
    """Bug: whoever followed an answer of which most was guessed had a third of the time to read as much."""
    plain, fast = made(), made()
    plain.saved_s = fast.saved_s = 0.0
    plain.passed(4, 0, 0, 0.07, is_wanted=True, tokens_a_pass=1.2)
    fast.passed(4, 0, 0, 0.07, is_wanted=True, tokens_a_pass=5.0)
    assert plain.saved_s == pytest.approx(0.1 * 0.07)
    assert fast.saved_s == pytest.approx(0.1 * 5 * 0.05 / FAST)


def test_what_answers_would_take_without_guesses_is_not_made_up() -> None:
    """Bug: where they always had guesses, those slower passes stood for passes without, and too much was earned."""
    spare = Spare(0.1)
    spare.passed(8, 0, 0, 0.16, is_wanted=True, tokens_a_pass=6.0)
    assert spare.saved_s == pytest.approx(0.1 * 0.16)
    spare.passed(8, 0, 0, 0.16, is_wanted=True, tokens_a_pass=6.0)
    assert spare.saved_s == pytest.approx(2 * 0.1 * 0.16)


@given(
    share=st.floats(0.01, 0.5),
    passes=st.lists(st.tuples(st.integers(1, 8), st.floats(0, 0.1), st.floats(0, 0.02)), min_size=1, max_size=200),
)
def test_answers_that_guesses_make_fast_are_slowed_by_the_share_of_what_they_save(
    share: float, passes: list[tuple[int, float, float]]
) -> None:
    """Of the time at `FAST` times the pace without guesses, whatever a pass and a row take."""
    spare = made(share)
    earning_s, extra_s, largest_s = 0.05, 0.0, 0.0
    for tokens, pass_s, row_s in passes:
        spare.passed(8, 0, 0, 0.1, is_wanted=True, tokens_a_pass=tokens)
        earning_s += max(0.1, tokens * 0.05 / FAST)
        num_rows = spare.num_rows(8)
        if num_rows:
            took_s = pass_s + num_rows * row_s
            spare.passed(8, 0, num_rows, 0.1 + took_s, is_wanted=True, tokens_a_pass=tokens)
            earning_s += max(0.1, tokens * 0.05 / FAST)
            extra_s, largest_s = extra_s + took_s, max(largest_s, took_s)
    assert extra_s <= share * earning_s + largest_s + 1e-6


@given(pass_s=st.floats(0, 2), row_s=st.floats(1e-4, 0.1))
def test_whoever_waits_for_a_chunk_gets_it(pass_s: float, row_s: float) -> None:
    """Bug: the most that is saved could be a hair less than the largest chunk takes, and nothing was read any more."""
    spare = made()
    for num_rows in (16, 48) * 10:
        beside(spare, num_rows, pass_s + row_s * num_rows)
    for _ in range(10_000):
        if spare.num_rows(1) >= spare.chunk:
            return
        spare.passed(1, 0, 0, 100.0, is_wanted=True)
    raise AssertionError(f"{spare.num_rows(1)} of {spare.chunk} rows")
