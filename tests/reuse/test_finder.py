"""Which of several sources is moved, and what is known about a text's surroundings, here and there."""

from __future__ import annotations

import pytest

from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PagePool
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import Sequence as KVSequence
from kvcomm.reuse import finder as moves
from kvcomm.reuse.finder import MoveFinder

ROLE_A, ROLE_B = Segment(tuple(range(10))), Segment(tuple(range(20, 35)))
QUESTION, FIRST = Segment(tuple(range(40, 46)), "question"), Segment(tuple(range(50, 58)), "first")
SECOND, TAIL = Segment(tuple(range(60, 67)), "second"), Segment((7, 8))


def test_a_move_knows_what_its_source_had_not_read() -> None:
    pool = PagePool([], num_pages=64, page_size=4)
    memory = Memory(pool, ttl_s=None, segment_bytes=2**20)
    finder = MoveFinder(memory, lambda namespace, edge: 0)
    written = _computed(memory, (ROLE_A, QUESTION, TAIL, SECOND))
    finder.publish("n", (ROLE_A, QUESTION, TAIL, SECOND), written, start=0, risk=0.0)

    prompt = (ROLE_B, QUESTION, FIRST, SECOND, TAIL)
    own = _computed(memory, prompt)
    question, second = finder.find("n", prompt, 0, own)

    assert question.around == (QUESTION.token_ids, [], [])
    assert second.around == (SECOND.token_ids, [QUESTION.token_ids], [FIRST.token_ids])
    finder.release([question, second])
    memory.check_integrity([written.pages, own.pages])


class _Team:
    """Two writers whose answers a third agent reads; publishes what they have written."""

    def __init__(self) -> None:
        self.memory = Memory(PagePool([], num_pages=400, page_size=4), ttl_s=None, segment_bytes=2**20)
        self.evidence: dict[str, int] = {}
        self.finder = MoveFinder(self.memory, lambda namespace, edge: self.evidence.get(edge.source, 0))

    def read(self, first: tuple[int, ...], second: tuple[int, ...], *, is_use: bool = True) -> tuple[str, str]:
        """The sources of both answers."""
        for role, answer in ((ROLE_A, first), (ROLE_B, second)):
            segments = (role, Segment(answer, "answer"))
            self.finder.publish("n", segments, _computed(self.memory, segments), start=0, risk=0.0)
        prompt = (TAIL, Segment(first, "first"), Segment(second, "second"), TAIL)
        one, two = self.finder.find("n", prompt, 0, _computed(self.memory, prompt), is_use=is_use)
        self.finder.release([one, two])
        return one.edge.source, two.edge.source


def test_agents_who_agree_are_read_from_where_each_is_read_when_they_do_not() -> None:
    """Bug: equal answers were all taken from the first writer, so what was measured fell apart into rare edges."""
    team = _Team()
    own_first, own_second = team.read((100, 101), (102, 103))
    assert own_first != own_second
    assert team.read((104, 105), (104, 105)) == (own_first, own_second)


def test_among_edges_seen_as_often_that_is_taken_about_which_more_is_known() -> None:
    team = _Team()
    first, same = team.read((100, 101), (100, 101))
    assert first == same
    other = _Team()
    own_first, own_second = other.read((100, 101), (102, 103), is_use=False)
    assert own_first == first
    other.evidence[own_second] = 1
    assert other.read((104, 105), (104, 105), is_use=False) == (own_second, own_second)


def test_edges_that_are_counted_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "MAX_COUNTED_EDGES", 3)
    team = _Team()
    for token in range(100, 140, 4):
        team.read((token, token + 1), (token + 2, token + 3))
        team.read((token + 1, token + 2), (token + 1, token + 2))
    assert len(team.finder._times_seen) == 3


def _computed(memory: Memory, segments: tuple[Segment, ...]) -> KVSequence:
    sequence = KVSequence(memory.pool, [token for segment in segments for token in segment.token_ids])
    memory.make_writable(sequence, 0, sequence.num_tokens)
    sequence.num_computed = sequence.num_tokens
    return sequence
