"""Which of several sources is moved, what is kept of a text that many contexts read, and what moves know of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.align.edges import signatures
from kvcomm.align.moves import Move
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import LayerShape, PagePool
from kvcomm.memory.renditions import Rendition
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import Identity, KVSequence
from kvcomm.reuse.finder import MAX_RENDITIONS, MoveFinder, occurrences, parts_of
from kvcomm.reuse.plan import Part, Reason, plan_of
from tests.stored import stored_in

ROLE_A, ROLE_B = Segment(tuple(range(10))), Segment(tuple(range(20, 35)))
QUESTION, FIRST = Segment(tuple(range(40, 46)), "question"), Segment(tuple(range(50, 58)), "first")
SECOND, TAIL = Segment(tuple(range(60, 67)), "second"), Segment((7, 8))


class Library:
    """A memory without layers, in which prompts are read; its clock goes on by one with every reading."""

    def __init__(self, num_pages: int = 4000) -> None:
        self.memory = Memory(PagePool([], num_pages=num_pages, page_size=4), ttl_s=None, rendition_bytes=2**20)
        self.finder = MoveFinder(self.memory)
        self.now_s = 0.0
        self.memory.renditions._clock = lambda: self.now_s

    def computed(self, segments: Sequence[Segment]) -> KVSequence:
        """A sequence with all of these, computed."""
        sequence = KVSequence(self.memory.pool, [token for segment in segments for token in segment.token_ids])
        self.memory.make_writable(sequence, 0, sequence.num_tokens)
        sequence.count(sequence.num_tokens)
        return sequence

    def read(self, *segments: Segment, risk: float | None = None) -> KVSequence:
        """Let somebody read a prompt, exactly if there is no risk, and others know of it."""
        self.now_s += 1
        sequence = self.computed(segments)
        if risk is not None:
            sequence.mark_approximate(0)
        self.finder.publish("n", segments, sequence, start=0, risk=risk or 0.0)
        return sequence

    def find(self, *segments: Segment, **how: Any) -> list[Move]:
        """What would be moved into a prompt; the pages are given back at once."""
        own = self.computed(segments)
        moves = self.finder.find("n", segments, how.pop("num_exact", 0), own, **how)
        self.finder.release(moves)
        own.release()
        return moves

    def source(self, move: Move) -> Rendition:
        """Which rendition a move takes."""
        (found,) = (each for each in stored_in(self.memory.renditions, "n") if each.identity is move.source.owner)
        return found


@pytest.fixture
def library() -> Iterator[Library]:
    made = Library()
    yield made
    made.memory.renditions.check_integrity()


def passage(number: int, name: str = "document", length: int = 5) -> Segment:
    """A text that no other number has."""
    return Segment(tuple(range(1000 + 10 * number, 1000 + 10 * number + length)), name)


def test_a_move_knows_what_its_source_had_not_read(library: Library) -> None:
    written = library.read(ROLE_A, QUESTION, TAIL, SECOND)
    prompt = (ROLE_B, QUESTION, FIRST, SECOND, TAIL)
    own = library.computed(prompt)
    question, second = library.finder.find("n", prompt, 0, own)
    assert question.around == (QUESTION.token_ids, [], [])
    assert second.around == (SECOND.token_ids, [QUESTION.token_ids], [FIRST.token_ids])
    assert (question.num_unread, second.num_unread) == (0, 1)
    assert (question.start, question.end, second.start, second.end) == (15, 21, 29, 36)
    library.finder.release([question, second])
    library.memory.check_integrity([written.pages, own.pages])


def test_a_source_is_where_it_says(library: Library) -> None:
    """Position, first slot and pages: also of text that begins and ends inside pages."""
    written = library.read(ROLE_A, QUESTION, TAIL, SECOND)
    (_, second) = library.find(ROLE_B, QUESTION, FIRST, SECOND, TAIL)
    first = 10 + 6 + 2
    assert second.source.start == first
    slots = second.source.slots
    found = list(range(slots.start, slots.stop)) if isinstance(slots, slice) else slots.tolist()
    assert found == [int(written.pages[at // 4]) * 4 + at % 4 for at in range(first, first + 7)]
    assert second.source_pages.tolist() == written.pages[first // 4 : -(-(first + 7) // 4)].tolist()


def test_what_has_read_most_comes_first_whatever_else_speaks_against_it(library: Library) -> None:
    library.read(ROLE_A, QUESTION, FIRST, SECOND, risk=5.0)
    library.read(ROLE_A, QUESTION, SECOND)
    library.read(ROLE_A, SECOND)
    *_, second = library.find(ROLE_B, QUESTION, FIRST, SECOND, TAIL)
    assert (second.num_unread, second.risk, second.is_exact) == (0, 5.0, False)


def test_that_it_has_read_more_does_no_harm(library: Library) -> None:
    library.read(ROLE_A, QUESTION, FIRST, SECOND)
    library.read(ROLE_A, FIRST, SECOND, risk=0.5)
    *_, second = library.find(ROLE_B, FIRST, SECOND, TAIL)
    assert second.is_exact
    assert second.around.seen == [QUESTION.token_ids, FIRST.token_ids]


def test_neighbors_come_from_one_context(library: Library) -> None:
    """Whoever wrote the answer to a question has read the question as the answer did."""
    library.read(ROLE_A, QUESTION)
    writer = library.read(ROLE_B, QUESTION, FIRST, risk=0.5)
    question, first = library.find(TAIL, QUESTION, FIRST, TAIL)
    assert library.source(question).context is library.source(first).context is writer.identity
    (question,) = library.find(TAIL, QUESTION, TAIL)
    assert question.is_exact


def test_among_equals_exact_then_the_least_risk_then_the_nearest_then_the_newest(library: Library) -> None:
    roles = [
        Segment(tuple(range(300 + 20 * number, 300 + 20 * number + length)))
        for number, length in enumerate((3, 6, 9, 6))
    ]
    for role, risk in zip(roles, (0.5, None, None, 0.25), strict=True):
        library.read(role, QUESTION, risk=risk)
    assert library.source(library.find(TAIL, QUESTION, TAIL)[0]).start == 6  # exact, as the third, and nearer
    library.memory.renditions.reset("n")
    for role, risk in zip(roles, (0.5, 0.25, 0.5, 0.25), strict=True):
        library.read(role, QUESTION, risk=risk)
    newest = library.source(library.find(TAIL, QUESTION, TAIL)[0])
    assert (newest.risk, newest.created_s) == (0.25, library.now_s)


def test_a_source_with_more_risk_than_is_accepted_is_none(library: Library) -> None:
    library.read(ROLE_A, QUESTION, risk=0.5)
    assert library.find(ROLE_B, QUESTION, TAIL, max_risk=0.4) == []
    assert len(library.find(ROLE_B, QUESTION, TAIL, max_risk=0.5)) == 1
    library.read(ROLE_A, FIRST, QUESTION)
    assert library.find(ROLE_B, QUESTION, TAIL, max_risk=0.4) == []  # known, but only from behind another text


def test_the_first_text_is_not_moved_from_behind_others(library: Library) -> None:
    library.read(ROLE_A, FIRST, SECOND)
    segments = (ROLE_B, SECOND, FIRST, TAIL)
    (first,) = library.find(*segments)
    assert (first.start, first.num_unread) == (15 + 7, 1)
    assert library.finder.is_displaced("n", segments)
    library.read(ROLE_A, SECOND)
    assert [move.start for move in library.find(*segments)] == [15, 22]
    assert not library.finder.is_displaced("n", segments)
    assert not library.finder.is_displaced("n", (ROLE_B, TAIL))


def test_only_what_was_there_before_and_is_not_its_own(library: Library) -> None:
    library.read(ROLE_A, QUESTION)
    assert library.find(ROLE_B, QUESTION, TAIL, before_s=1.0) == []
    assert len(library.find(ROLE_B, QUESTION, TAIL, before_s=1.5)) == 1
    own = library.read(ROLE_B, FIRST, TAIL)
    assert library.finder.find("n", (ROLE_B, FIRST, TAIL), 0, own) == []


def test_a_text_is_found_although_its_first_page_is_shared_for_what_stands_before_it(library: Library) -> None:
    """Bug: two prompts with the same first word moved nothing that begins in their first page."""
    written = library.read(Segment((1, 2)), QUESTION, TAIL)
    prompt = (Segment((1, 3)), QUESTION, TAIL)
    own = KVSequence(library.memory.pool, [token for segment in prompt for token in segment.token_ids])
    own.adopt(written.pages[:1], 1)
    (move,) = library.finder.find("n", prompt, 1, own)
    assert (move.start, move.end) == (2, 2 + len(QUESTION.token_ids))
    library.finder.release([move])
    own.release()


def test_behind_the_exact_prefix_and_short_of_the_last_token(library: Library) -> None:
    library.read(ROLE_A, QUESTION, FIRST)
    segments = (ROLE_B, QUESTION, FIRST)
    assert [(move.start, move.end, move.index) for move in library.find(*segments, num_exact=18)] == [
        (18, 21, 3),
        (21, 28, 0),
    ]
    assert [(move.start, move.end) for move in library.find(*segments, num_exact=21)] == [(21, 28)]
    assert library.find(*segments, num_exact=28) == []


def test_looking_is_no_use_and_finding_is(library: Library) -> None:
    library.read(ROLE_A, QUESTION)
    library.read(ROLE_A, FIRST)
    library.find(ROLE_B, QUESTION, TAIL, is_use=False)
    store = library.memory.renditions
    assert [entry[1] for entry in store._order] == [QUESTION.digest("n"), FIRST.digest("n")]
    library.find(ROLE_B, QUESTION, TAIL)
    assert [entry[1] for entry in store._order] == [FIRST.digest("n"), QUESTION.digest("n")]


def test_renditions_that_add_something_are_kept_and_no_others(library: Library) -> None:
    def kept() -> list[tuple[int, Fidelity]]:
        found = library.memory.renditions.renditions_of("n", SECOND)
        return sorted((len(each.before), each.fidelity) for each in found)

    library.read(ROLE_A, QUESTION, SECOND, risk=0.5)
    library.read(ROLE_A, Segment(QUESTION.token_ids, "question_2"), SECOND, risk=0.4)
    assert kept() == [(1, Fidelity.APPROXIMATE)]
    library.read(ROLE_A, QUESTION, SECOND)  # an exact one is better, and an approximate one then adds nothing
    library.read(ROLE_A, QUESTION, SECOND, risk=0.1)
    assert kept() == [(1, Fidelity.APPROXIMATE), (1, Fidelity.EXACT)]
    library.read(ROLE_A, QUESTION, FIRST, SECOND)  # another context altogether: its own edges
    assert len(kept()) == 3
    for number in range(2 * MAX_RENDITIONS):
        library.read(ROLE_A, Segment(passage(number).token_ids[: 1 + number % 5], "question"), SECOND)
    same = [
        each
        for each in library.memory.renditions.renditions_of("n", SECOND)
        if each.signature == signatures((ROLE_A, QUESTION, SECOND))[2] and each.fidelity is Fidelity.EXACT
    ]
    assert len(same) == MAX_RENDITIONS


def test_slots_of_one_kind_share_signatures_so_that_a_passage_has_one_edge_in_any_order(library: Library) -> None:
    """Documents retrieved in another order: every one but the first is moved, and all by one bank."""
    documents = [passage(number) for number in range(4)]

    def in_order(*order: int) -> tuple[Segment, ...]:
        row = [Segment(documents[number].token_ids, f"document_{place}") for place, number in enumerate(order, 1)]
        return (
            ROLE_A,
            *itertools.chain.from_iterable((each, Segment((9, place))) for place, each in enumerate(row)),
            TAIL,
        )

    library.read(*in_order(0, 1, 2, 3))
    moves = library.find(*in_order(3, 1, 0, 2))
    assert [move.start for move in moves] == [10 + 7 * place for place in (1, 2, 3)]
    edges = {move.edge for move in moves}
    assert len(edges) == 1
    (edge,) = edges
    assert (edge.slot, edge.source_slot, edge.source) == ("document", "document", edge.target)
    assert [len(move.around.unseen) for move in moves] == [1, 2, 1]
    elsewhere = library.find(ROLE_B, documents[1], documents[0], TAIL)
    assert {move.edge.source for move in elsewhere} == {edge.source}
    assert {move.edge.target for move in elsewhere} != {edge.target}


def test_the_plan_says_why_each_part_is_computed() -> None:
    segments = (ROLE_A, QUESTION, TAIL, FIRST, SECOND, TAIL)  # 10, 6, 2, 8, 7, 2
    parts = parts_of(segments, 4, [(18, 26)], otherwise=Reason.NEW, unmoved=Reason.NO_SOURCE, is_displaced=True)
    told = [(part.start, part.end, part.reason) for part in parts]
    assert told == [
        (4, 10, Reason.NEW),
        (10, 16, Reason.DISPLACED),
        (16, 18, Reason.NEW),
        (18, 26, None),
        (26, 33, Reason.NO_SOURCE),
        (33, 35, Reason.GLUE),
    ]
    plan = plan_of(4, parts)
    assert plan.reasons == {"new": 8, "displaced": 6, "no_source": 7, "glue": 2}


def test_the_rest_of_a_slot_has_the_slots_own_reason() -> None:
    """Where the exact prefix reached into a slot, its rest was once told as `new`, whatever kept it from moving."""
    segments = (ROLE_A, QUESTION, TAIL, FIRST)  # 10, 6, 2, 8
    parts = parts_of(segments, 13, [], otherwise=Reason.NEW, unmoved=Reason.BOUND, is_displaced=False)
    assert parts == [Part(13, 16, Reason.BOUND), Part(16, 18, Reason.NEW), Part(18, 26, Reason.BOUND)]
    displaced = parts_of(segments, 13, [], otherwise=Reason.NEW, unmoved=Reason.BOUND, is_displaced=True)
    assert displaced[0] == Part(13, 16, Reason.DISPLACED)
    asked_again = parts_of(segments, 25, [], otherwise=Reason.LAST_TOKEN, unmoved=Reason.BOUND, is_displaced=False)
    assert asked_again == [Part(25, 26, Reason.LAST_TOKEN)]
    moved = parts_of(segments, 13, [(13, 15)], otherwise=Reason.NEW, unmoved=Reason.BOUND, is_displaced=False)
    assert moved[:3] == [Part(13, 15, None), Part(15, 16, Reason.BOUND), Part(16, 18, Reason.GLUE)]


TEXTS = [passage(number, "document", 4) for number in range(4)]
CONTEXTS = [Identity() for _ in range(3)]


class Known(NamedTuple):
    """One rendition of the text that is looked for."""

    before: tuple[int, ...]
    context: int
    risk: float
    start: int


@given(
    st.lists(
        st.builds(
            Known,
            st.lists(st.integers(1, 3), unique=True).map(tuple),
            st.integers(0, 2),
            st.sampled_from([0.0, 0.5, 1.0]),
            st.integers(0, 40),
        ),
        min_size=1,
        max_size=6,
        unique_by=lambda known: (known.start, known.risk == 0),
    ),
    st.lists(st.integers(1, 3), unique=True).map(tuple),
    st.integers(-1, 2),
    st.sampled_from([math.inf, 0.5]),
)
def test_the_source_is_that_of_a_naive_ranking(
    known: list[Known], before: tuple[int, ...], behind: int, max_risk: float
) -> None:
    """Text 0 behind others; the text behind it, if any, is known from one context only."""
    library = Library(600)
    end = Segment((1, 2, 3), "end")
    row = [TEXTS[number] for number in before]
    segments = (ROLE_A, *row, TEXTS[0], *([end] if behind >= 0 else []), TAIL)
    place = next(each for each in occurrences(segments) if each.segment is TEXTS[0])
    written = library.computed((passage(99, "x", 9),))

    def keep(segment: Segment, at: Known) -> None:
        library.now_s += 1
        library.memory.renditions.put(
            "n",
            segment,
            signature="somewhere",
            start=at.start,
            pages=written.pages[: -(-len(segment.token_ids) // 4)],
            offset=0,
            fidelity=Fidelity.APPROXIMATE if at.risk else Fidelity.EXACT,
            risk=at.risk,
            slot="document",
            before=tuple(TEXTS[number] for number in at.before),
            context=CONTEXTS[at.context],
        )

    for each in known:
        keep(TEXTS[0], each)
    if behind >= 0:
        keep(end, Known((1,), behind, 0.0, 100))

    best: tuple[int, Known] | None = None
    for number, each in enumerate(known):
        if each.risk > max_risk or (each.before and not before):
            continue
        if best is None:
            best = number, each
            continue
        other = best[1]
        unread, unread_there = len(set(before) - set(each.before)), len(set(before) - set(other.before))
        apart, apart_there = each.context != behind, other.context != behind
        way, way_there = abs(each.start - place.start), abs(other.start - place.start)
        ours = [unread, apart, each.risk > 0, each.risk, way]
        theirs = [unread_there, apart_there, other.risk > 0, other.risk, way_there]
        if ours <= theirs:  # of equals the newer one
            best = number, each

    found = [move for move in library.find(*segments, max_risk=max_risk) if move.start == place.start]
    if best is None:
        assert found == []
    else:
        (move,) = found
        assert library.source(move).created_s == 1 + best[0]
        assert move.num_unread == len(set(before) - set(best[1].before))
        assert (move.risk, move.is_exact) == (best[1].risk, best[1].risk == 0)


class CountedOrder(dict[Any, None]):
    """A dict that counts how many of its entries somebody has looked at by walking through it."""

    num_seen = 0

    def __iter__(self) -> Iterator[Any]:
        for entry in super().__iter__():
            self.num_seen += 1
            yield entry


def test_thousands_of_passages_within_a_byte_budget() -> None:
    """Keeping and finding one takes no longer among thousands than among ten; the newest are those that are kept."""
    num_kept, num_read = 5000, 5400
    pool = PagePool([LayerShape(1, 1, 1)], num_pages=12000, page_size=4)
    library = Library()
    library.memory = Memory(pool, ttl_s=None, rendition_bytes=2 * num_kept * pool.page_bytes)
    library.finder = MoveFinder(library.memory)
    store = library.memory.renditions
    store._clock = lambda: library.now_s
    store._order = order = CountedOrder()
    for number in range(num_read):
        library.read(ROLE_A, passage(number), TAIL).release()
        # Looked at: what is dropped for it, and never a share of all that is there.
        assert order.num_seen <= 4
        order.num_seen = 0
        assert store._num_pages <= 2 * num_kept
    assert len(stored_in(store, "n")) == num_kept
    order.num_seen = 0
    for number in np.linspace(0, num_read - 1, 50).astype(int).tolist():
        moves = library.find(ROLE_B, passage(number), TAIL)
        assert len(moves) == (number >= num_read - num_kept)
    assert order.num_seen == 0
    store.check_integrity()
