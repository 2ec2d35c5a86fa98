"""Ids that say where their context is, and who has it when that replica is gone."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from kvcomm.integrations.ray.pinning import Pin, PinnedIds, owner, pin_of, tag_of
from kvcomm.server.responses.keeping import context_id_of, response_id
from kvcomm.server.schemas.common import CONTEXT_ID
from kvcomm.server.schemas.responses import RESPONSE_ID

REPLICAS = st.sets(st.text("abcdefgh0123456789", min_size=4, max_size=8), min_size=1, max_size=8)


def test_ids_are_such_as_the_server_takes() -> None:
    ids = PinnedIds("one")
    assert re.fullmatch(CONTEXT_ID, ids(None))
    assert re.fullmatch(RESPONSE_ID, response_id(ids, None))


def test_a_fork_and_a_response_that_follows_belong_to_the_family_of_the_first() -> None:
    ids = PinnedIds("one")
    first = ids(None)
    elsewhere = PinnedIds("two")
    follows = response_id(elsewhere, f"resp_{first.removeprefix('ctx_')}")
    members = [first, ids(first), elsewhere(first), context_id_of(follows)]
    assert {pin_of(each) for each in members} == {pin_of(first)}
    assert len(set(members)) == len(members)


def test_two_families_of_a_replica_differ_only_in_the_family() -> None:
    ids = PinnedIds("one")
    one, two = pin_of(ids(None)), pin_of(ids(None))
    assert one is not None
    assert two is not None
    assert one.tag == two.tag == tag_of("one")
    assert one.family != two.family


def test_what_is_no_id_says_nothing() -> None:
    for text in ("", "ctx_", "ctx_" + "0" * 23, "ctx_" + "0" * 25, "ctx_" + "G" * 24, "msg_" + "0" * 24):
        assert pin_of(text) is None


@given(REPLICAS, st.integers(0, 2**32 - 1))
def test_the_maker_has_it_while_it_lives(replicas: set[str], family: int) -> None:
    for maker in replicas:
        assert owner(Pin(tag_of(maker), f"{family:08x}"), replicas, heir=None) == maker
        assert owner(Pin(tag_of(maker), f"{family:08x}"), replicas, heir=min(replicas)) == maker


@given(REPLICAS, st.integers(0, 2**32 - 1))
def test_after_the_maker_every_router_finds_the_same(replicas: set[str], family: int) -> None:
    pin = Pin(tag_of("gone"), f"{family:08x}")
    found = owner(pin, replicas, heir=None)
    assert found in replicas
    assert owner(pin, sorted(replicas, reverse=True), heir=None) == found
    for heir in replicas:
        assert owner(pin, replicas, heir=heir) == heir
    assert owner(pin, replicas, heir="gone too") == found
    others = replicas - {min(replicas - {found}, default=found)}
    if found in others:
        assert owner(pin, others, heir=None) == found  # another one that goes takes nothing of this one's along


def test_nobody_has_it_where_there_is_nobody() -> None:
    assert owner(Pin("000000", "00000000"), [], heir="gone") is None
