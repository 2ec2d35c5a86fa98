"""Readers: what makes two prompts examples of the same thing, and what does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.align.readers import Reader, kind_of, reader_of, template_of
from kvcomm.memory.segments import Segment

ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6).map(tuple)
KINDS = ("question", "document", "solver")
slots = st.builds(Segment, ids, st.builds(lambda kind, at: f"{kind}_{at}", st.sampled_from(KINDS), st.integers(0, 20)))
prompts = st.lists(st.one_of(st.builds(Segment, ids), slots), max_size=8)


def static(*token_ids: int) -> Segment:
    return Segment(token_ids)


def slot(name: str, *token_ids: int) -> Segment:
    return Segment(token_ids or (1,), name)


def told(segments: list[Segment]) -> list[object]:
    """The template by another way: joined static text, rows found from behind."""
    parts: list[object] = [()]
    for index, segment in enumerate(segments):
        if segment.name is None:
            parts[-1] = (*parts[-1], *segment.token_ids)  # type: ignore[misc]
            continue
        kind = segment.name.rpartition("_")[0]
        before = [each.name for each in segments[:index] if each.name is not None]
        if before and before[-1].rpartition("_")[0] == kind:
            parts[-1] = ()
        else:
            parts += [kind, ()]
    return parts


@given(prompts)
def test_the_template_is_static_text_and_kinds_in_turn(segments: list[Segment]) -> None:
    found = [part if isinstance(part, str) else tuple(part.tolist()) for part in template_of(segments)]
    assert found == told(segments)
    assert reader_of(segments).slots == tuple(part for part in found if isinstance(part, str))


@given(prompts, prompts)
def test_readers_are_alike_just_where_templates_are(one: list[Segment], other: list[Segment]) -> None:
    assert (reader_of(one) == reader_of(other)) == (told(one) == told(other))


@given(prompts, st.data())
def test_cutting_static_text_differently_changes_nothing(segments: list[Segment], data: st.DataObject) -> None:
    cut: list[Segment] = []
    for segment in segments:
        at = data.draw(st.integers(0, len(segment.token_ids)))
        parts = [segment.token_ids[:at], segment.token_ids[at:]] if segment.name is None else [segment.token_ids]
        cut += [Segment(part, segment.name) for part in parts]
    assert reader_of(cut) == reader_of(segments)


@given(prompts, st.data())
def test_texts_and_numbers_of_slots_never_enter(segments: list[Segment], data: st.DataObject) -> None:
    changed = [
        segment if segment.name is None else Segment(data.draw(ids), f"{segment.name.rpartition('_')[0]} {index}")
        for index, segment in enumerate(segments)
    ]
    assert reader_of(changed) == reader_of(segments)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_row_of_documents_is_one_reader_however_many_there_are(count: int) -> None:
    row = [part for at in range(count) for part in (static(50, at), slot(f"document_{at}", at + 1))]
    found = reader_of([static(1, 2), static(50, 0), *row[1:], static(9), slot("question", 4), static(5)])
    alone = reader_of([static(1, 2, 50, 0), slot("document", 7), static(9), slot("question", 8), static(5)])
    assert found == alone
    assert found.slots == ("document", "question")


def test_what_stands_before_between_and_behind_slots_counts() -> None:
    base = [static(1), slot("a", 9), static(3), slot("b", 9), static(5)]
    others = [
        [static(2), *base[1:]],
        [*base[:2], static(4), *base[3:]],
        [*base[:4], static(6)],
        base[:4],
        base[1:],
        [static(1), slot("b", 9), static(3), slot("a", 9), static(5)],
        [static(1), slot("a", 9), static(3), slot("c", 9), static(5)],
        [static(1, 3), slot("a", 9), slot("b", 9), static(5)],
        [static(1), slot("a", 9), static(3), slot("b", 9), static(7), slot("a", 9), static(5)],
        [static(1), slot("b", 9), static(5)],
        [],
    ]
    digests = {reader_of(segments).digest for segments in [base, *others]}
    assert len(digests) == 1 + len(others)


def test_a_kind_cannot_be_mistaken_for_its_neighbors() -> None:
    assert reader_of([slot("ab"), slot("c")]).digest != reader_of([slot("a"), slot("bc")]).digest
    assert reader_of([slot("ab")]) != reader_of([slot("a"), slot("b")])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("document_3", "document"),
        ("document 12", "document"),
        ("document3", "document"),
        ("document-[3", "document"),
        ("first answer_07", "first answer"),
        ("part 2 of answer 3", "part 2 of answer"),
        ("two\nlines 4", "two\nlines"),
        ("été_1", "été"),
        ("question", "question"),
        ("document_3b", "document_3b"),
        ("document_", "document_"),
        ("document 3\n", "document 3\n"),
        ("3", "3"),
        ("_3", "_3"),
        ("2024-11", "2024-11"),
        ("", ""),
    ],
)
def test_kinds_of_slots(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@given(st.text(max_size=20))
def test_a_kind_is_what_its_name_begins_with(name: str) -> None:
    kind = kind_of(name)
    assert name.startswith(kind)
    assert not any(letter.isalpha() for letter in name[len(kind) :])
    assert kind_of(kind + "_5") == kind or not kind[-1:].isalpha()


def test_a_prompt_of_nothing_has_a_reader() -> None:
    assert reader_of([]) == reader_of([Segment(())])
    assert reader_of([]) == Reader(reader_of([]).digest, ())
