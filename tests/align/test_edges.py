"""Signatures: what counts as the same context and what does not."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kvcomm.align.edges import Edge, signatures
from kvcomm.memory.segments import Segment

ids = st.lists(st.integers(0, 50_000), min_size=1, max_size=6).map(tuple)


def static(*token_ids: int) -> Segment:
    return Segment(token_ids)


def slot(name: str, *token_ids: int) -> Segment:
    return Segment(token_ids, name)


@given(ids, ids, ids)
def test_dynamic_text_never_enters(role: tuple[int, ...], one: tuple[int, ...], other: tuple[int, ...]) -> None:
    prompts = [
        [Segment(role), slot("question", *text), static(7), slot("solver", *reversed(text))] for text in (one, other)
    ]
    assert signatures(prompts[0]) == signatures(prompts[1])


@given(ids, st.integers(0, 6))
def test_cutting_static_text_differently_changes_nothing_behind_it(role: tuple[int, ...], at: int) -> None:
    whole = signatures([Segment(role), slot("question", 1)])
    cut = signatures([Segment(role[:at]), Segment(role[at:]), slot("question", 1)])
    assert whole[-1] == cut[-1]


def test_template_text_slot_names_and_order_count() -> None:
    base = signatures([static(1, 2), slot("a", 9), static(3), slot("b", 9)])[-1]
    others = [
        [static(1, 5), slot("a", 9), static(3), slot("b", 9)],
        [static(1, 2), slot("c", 9), static(3), slot("b", 9)],
        [static(1, 2), slot("a", 9), static(4), slot("b", 9)],
        [static(1, 2), slot("a", 9), static(3), slot("d", 9)],
        [slot("a", 9), static(1, 2), static(3), slot("b", 9)],
    ]
    assert base not in {signatures(segments)[-1] for segments in others}


@given(st.integers(1, 5), st.integers(0, 20))
def test_a_row_of_slots_of_one_kind_has_one_signature(count: int, first: int) -> None:
    row = [part for at in range(count) for part in (static(8, at), slot(f"document_{first + at}", at + 1))]
    found = signatures([static(1), *row[1:], static(9), slot("question", 4)])
    alone = signatures([static(1), slot("document 0", 7), static(9), slot("question", 4)])
    assert set(found[1::2][:count]) == {alone[1]}
    assert found[-2:] == alone[-2:]


def test_text_between_slots_of_one_kind_has_signatures_of_its_own() -> None:
    found = signatures([static(1), slot("a_1", 9), static(2), slot("a_2", 9), static(3), slot("a_3", 9)])
    assert len(set(found)) == 4
    assert found[2] == signatures([static(1), slot("a_7", 9), static(2)])[-1]


def test_another_kind_ends_a_row() -> None:
    broken = signatures([static(1), slot("a_1", 9), slot("b", 9), slot("a_2", 9)])
    assert len(set(broken)) == 4


def test_a_name_cannot_be_mistaken_for_its_neighbors() -> None:
    assert signatures([slot("ab", 1), slot("c", 1)])[-1] != signatures([slot("a", 1), slot("bc", 1)])[-1]


def test_edges_fall_back_to_their_slots() -> None:
    edge = Edge("one", "two", "question", "question")
    assert edge.general == replace(edge, source="three", target="four").general
    assert edge.general.is_general
    assert not edge.is_general
    assert len({edge.digest, edge.general.digest, replace(edge, source="on", target="etwo").digest}) == 3
