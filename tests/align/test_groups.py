"""Groups: what is compared, what is fixed, what restarts."""

from __future__ import annotations

import pytest
import torch

from kvcomm.align.edges import Edge
from kvcomm.align.groups import Contest, EdgeGroup, GroupBook, GroupKey

NUM_CONTESTED = 8

KEY = GroupKey(((Edge("s", "t", "a", "a"), True),), "token", (0.0, 0.5))
STRENGTHS = (1.0, 0.5, 0.0)


def contest(*divergences: float, count: int = NUM_CONTESTED) -> Contest:
    found = Contest(STRENGTHS, NUM_CONTESTED)
    for _ in range(count):
        found.add(divergences)
    return found


@pytest.mark.parametrize(
    ("divergences", "winner"),
    [
        ((0.1, 0.2, 0.3), 1.0),
        ((0.3, 0.1, 0.2), 0.5),
        ((0.3, 0.2, 0.1), 0.0),
        ((0.095, 0.2, 0.1), 0.0),  # too little to be sure of
        ((0.09, 0.2, 0.1), 1.0),
    ],
)
def test_a_correction_has_to_win_clearly(divergences: tuple[float, ...], winner: float) -> None:
    assert contest(*divergences).winner == winner


def test_a_contest_is_over_after_enough_prompts() -> None:
    assert not contest(0.1, 0.2, 0.3, count=NUM_CONTESTED - 1).is_over
    assert contest(0.1, 0.2, 0.3).is_over
    assert Contest((1.0,), 8).is_over
    assert Contest((1.0,), 8).winner == 1.0


def test_sums_decide_and_not_the_last_prompt() -> None:
    found = contest(0.1, 0.2, 0.3, count=3)
    found.add((0.3, 0.2, 0.1))
    assert found.winner == 1.0
    with pytest.raises(ValueError, match="zip"):
        found.add((0.1, 0.2))


def test_a_restart_forgets_everything_that_rested_on_the_anchors() -> None:
    group = EdgeGroup(KEY, STRENGTHS)
    group.contest.add((0.1, 0.2, 0.3))
    group.breaker((0.02, 0.05))
    group.restart()
    assert group.contest == Contest(STRENGTHS, 8)
    assert group.calibration.num_pairs == 0
    assert not group.breakers


def test_tenants_have_their_own_groups() -> None:
    book = GroupBook()
    group = book.group("a", KEY, STRENGTHS)
    assert book.group("a", KEY, STRENGTHS) is group
    assert book.find("b", KEY) is None
    assert [*book.groups("a")] == [group]
    assert not [*book.groups("b")]


def test_a_group_with_approximate_sources_begins_with_the_strength_of_its_exact_twin() -> None:
    """What sources are worth differs, what corrects them does not; the calibration is its own."""
    book = GroupBook(2)
    chained = KEY._replace(edges=tuple((edge, False) for edge, _ in KEY.edges))
    other = KEY._replace(shares=(0.0, 0.25))
    for _ in range(2):
        book.group("a", KEY, STRENGTHS).contest.add((0.3, 0.1, 0.2))
    assert book.group("a", chained, STRENGTHS).contest.is_over
    assert book.group("a", chained, STRENGTHS).strength == 0.5
    assert book.group("a", chained, STRENGTHS).calibration.num_pairs == 0
    assert not book.group("a", other, STRENGTHS).contest.is_over
    assert not book.group("b", chained, STRENGTHS).contest.is_over


def test_heads_are_learned_by_all_groups_of_a_tenant() -> None:
    book = GroupBook()
    for seed in range(8):
        attention = torch.rand(3, 40, generator=torch.Generator().manual_seed(seed))
        book.importance_fit("one").add(attention, attention[1])
    learned = book.head_weights("one", KEY)
    assert learned is not None
    assert max(range(3), key=lambda head: learned[head]) == 1
    assert book.head_weights("other", KEY) is None


def test_a_group_keeps_the_heads_it_was_calibrated_with() -> None:
    book = GroupBook()
    group = book.group("one", KEY, STRENGTHS)
    group.head_weights = (0.25, 0.75)
    assert book.head_weights("one", KEY._replace(shares=())) == (0.25, 0.75)
    assert book.head_weights("one", KEY._replace(estimator="paper")) is None
    group.restart()
    assert group.head_weights is None
