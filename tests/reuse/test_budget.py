"""The budget of learning: its share is kept over any time, and what cannot be spent for long is spent all the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcomm.reuse.budget import KNOWN_LOAN_S, LOAN_S, OVERDUE_S, Budget

seconds = st.floats(0, 30)
steps = st.lists(st.tuples(seconds, st.floats(0.001, 2), st.booleans()), max_size=200)


@given(steps, st.sampled_from([0.01, 0.1, 0.5, 0.9]), st.sampled_from([0.0, KNOWN_LOAN_S, LOAN_S]))
def test_the_share_is_kept_over_any_time(worked: list[tuple[float, float, bool]], share: float, loan_s: float) -> None:
    """But for what is lent beforehand, and the one step that goes over."""
    budget, served_s, longest_s = Budget(share, loan_s), 0.0, 0.0
    for serving_s, learning_s, somebody_waits in worked:
        budget.served_s += serving_s
        served_s += serving_s
        if budget.allows_more(somebody_waits):
            budget.learned(learning_s)
            longest_s = max(longest_s, learning_s)
        assert budget.spent_s <= share * (served_s + budget.spent_s + loan_s) + longest_s + 1e-6


@given(steps)
def test_a_share_of_nothing_allows_nothing(worked: list[tuple[float, float, bool]]) -> None:
    budget = Budget(0.0)
    for serving_s, _, somebody_waits in worked:
        budget.served_s += serving_s
        assert not budget.allows_more(somebody_waits)


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=300), st.booleans())
def test_what_is_allowed_is_there_when_it_is_wanted(serving: list[float], somebody_waits: bool) -> None:
    """Whoever always has something to learn gets its share, too: all that was not lent, if first tokens always wait."""
    budget = Budget(0.1)
    for serving_s in serving:
        budget.served_s += serving_s
        while budget.allows_more(somebody_waits):
            budget.learned(0.05)
    due_s = 0.1 * (sum(serving) + budget.spent_s)
    kept_back_s = OVERDUE_S if somebody_waits else -0.1 * LOAN_S
    assert budget.spent_s >= due_s - kept_back_s - 1e-6


def test_first_tokens_wait_only_for_what_has_piled_up() -> None:
    budget = Budget(0.1)
    assert budget.allows_more(somebody_waits=False)
    assert not budget.allows_more(somebody_waits=True)
    budget.served_s += OVERDUE_S / 0.1
    assert not budget.allows_more(somebody_waits=True)
    budget.served_s += 0.1
    assert budget.allows_more(somebody_waits=True)
    budget.learned(0.5)
    assert not budget.allows_more(somebody_waits=True)
    assert budget.allows_more(somebody_waits=False)
