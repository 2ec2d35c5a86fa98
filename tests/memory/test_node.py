"""Which namespaces are known and remembered, and that no counter is lost with those that are not."""

from __future__ import annotations

from kvcomm.memory.node import MAX_FORMER, MissReason, Namespaces, Use


def test_looking_makes_nothing_known_and_entering_does() -> None:
    spaces = Namespaces()
    assert spaces.look("a").name == "a"
    assert len(spaces) == 0
    entered = spaces.enter("a")
    assert spaces.look("a") is spaces.enter("a") is entered
    assert list(spaces) == [entered]
    assert spaces.names() == ()  # it holds nothing yet
    entered.quota_pages = 3
    assert spaces.names() == ("a",)


def test_only_the_latest_that_hold_nothing_are_remembered_and_all_are_counted() -> None:
    spaces, num_spaces = Namespaces(), 3 * MAX_FORMER
    for tick in range(num_spaces):
        space = spaces.enter(f"n{tick}")
        space.query_tokens, space.hit_tokens, space.dropped_tokens[MissReason.EXPIRED] = 5, 3, 2
        space.root.used = Use(tick, float(tick))
        if tick == 0:
            space.quota_pages = 7
    known = {space.name for space in spaces}
    # Those before the one that came last are the former ones; the one with a quota is none of them.
    assert known == {"n0", *(f"n{tick}" for tick in range(num_spaces - 1 - MAX_FORMER, num_spaces))}
    assert spaces.usage("n1") == spaces.usage("never seen")
    assert spaces.usage("n0").quota_pages == 7
    total = spaces.total_usage()
    assert (total.query_tokens, total.hit_tokens, total.expired_tokens) == tuple(num_spaces * n for n in (5, 3, 2))
    assert total.quota_pages is None
