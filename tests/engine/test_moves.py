"""What the finder of moves knows about a text's surroundings, here and where it comes from."""

from __future__ import annotations

from kvcomm.engine.moves import MoveFinder
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PagePool
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import Sequence as KVSequence

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


def _computed(memory: Memory, segments: tuple[Segment, ...]) -> KVSequence:
    sequence = KVSequence(memory.pool, [token for segment in segments for token in segment.token_ids])
    memory.make_writable(sequence, 0, sequence.num_tokens)
    sequence.num_computed = sequence.num_tokens
    return sequence
