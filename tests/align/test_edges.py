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


def test_a_name_cannot_be_mistaken_for_its_neighbors() -> None:
    assert signatures([slot("ab", 1), slot("c", 1)])[-1] != signatures([slot("a", 1), slot("bc", 1)])[-1]


def test_edges_fall_back_to_their_slots() -> None:
    edge = Edge("one", "two", "question", "question")
    assert edge.general == replace(edge, source="three", target="four").general
    assert edge.general.is_general
    assert not edge.is_general
    assert len({edge.digest, edge.general.digest, replace(edge, source="on", target="etwo").digest}) == 3
