"""What pool, tree and segments do together."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.errors import PoolExhausted
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PageIds, PagePool
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import KVSequence
from kvcomm.memory.tree import MissReason
from tests.stored import stored_in


def test_pages_that_tree_and_segments_share_can_be_had_back() -> None:
    """Each of them passed over what the other held too, so a pool full of caches looked exhausted."""
    pool = PagePool([], num_pages=4, page_size=4)
    memory = Memory(pool, ttl_s=None, rendition_bytes=2**20)
    tokens = np.arange(16, dtype=np.int32)
    pages = pool.allocate(4)
    memory.tree.insert("n", tokens, pages)
    segment = Segment(tuple(tokens.tolist()))
    memory.renditions.put("n", segment, signature="s", start=0, pages=pages, offset=0, fidelity=Fidelity.EXACT)
    pool.release(pages)
    assert pool.num_free == 0

    sequence = KVSequence(pool, range(100, 112))
    memory.make_writable(sequence, 0, 12)

    assert sequence.num_pages == 3
    memory.check_integrity([sequence.pages])


def test_a_leaf_that_somebody_holds_does_not_protect_what_is_above_it() -> None:
    """Its page is the holder's, but its ancestors' pages are only the tree's."""
    pool = PagePool([], num_pages=4, page_size=4)
    memory = Memory(pool, ttl_s=None, rendition_bytes=2**20)
    pages = pool.allocate(2)
    memory.tree.insert("n", range(4), pages[:1])
    memory.tree.insert("n", range(8), pages)
    pool.release(pages[:1])  # the second page stays somebody's
    sequence = KVSequence(pool, range(100, 112))
    memory.make_writable(sequence, 0, 12)
    memory.check_integrity([sequence.pages, pages[1:]])


@settings(max_examples=200)
@given(st.data())
def test_room_is_made_exactly_where_dropping_everything_would_make_it(data: st.DataObject) -> None:
    """Against a naive count: drop all that may go in a copy of the memory, and look how many pages are free."""
    seed = data.draw(st.integers(0, 2**32 - 1))
    wanted = data.draw(st.integers(1, 12))
    memory, held = _random_memory(seed)
    other, _ = _random_memory(seed)
    for _ in range(20):
        other.tree.evict_all(100)
        other.renditions.evict(100)
        other.renditions.drop_oldest()
    possible = wanted <= other.pool.num_free
    before = _state(memory)
    if possible:
        memory.make_room(wanted)
        assert memory.pool.num_free >= wanted
    else:
        with pytest.raises(PoolExhausted, match=f"{wanted} pages are needed"):
            memory.make_room(wanted)
        assert _state(memory) == before
    memory.check_integrity(held)


def _random_memory(seed: int) -> tuple[Memory, list[PageIds]]:
    """A small pool full of prefixes, renditions and holders, with pins here and there; the same for the same seed."""
    random = Random(seed)
    pool = PagePool([], num_pages=12, page_size=2)
    memory = Memory(pool, ttl_s=None, rendition_bytes=2**20)
    held: list[PageIds] = []
    while pool.num_free > 1:
        path = tuple(random.randrange(2) for _ in range(random.randrange(1, 9)))
        sequence = KVSequence(pool, path)
        match = memory.tree.match("n", np.array(path, dtype=np.int32))
        sequence.adopt(match.pages, match.num_tokens)
        if sequence.num_missing_pages(len(path)) > pool.num_free:
            sequence.release()
            break
        sequence.make_writable(sequence.num_computed, len(path))
        sequence.num_computed = len(path)
        if random.random() < 0.8:
            memory.tree.insert("n", np.array(path, dtype=np.int32), sequence.pages)
        if random.random() < 0.4:
            segment = Segment(path)
            memory.renditions.put(
                "n", segment, signature="s", start=0, pages=sequence.pages, offset=0, fidelity=Fidelity.EXACT
            )
        if random.random() < 0.1:
            memory.tree.pin("n", path)
        if random.random() < 0.3:
            held.append(sequence.pages.copy())
        else:
            sequence.release()
    return memory, held


def _state(memory: Memory) -> tuple[object, ...]:
    nodes = [(node.start, node.end, node.num_pages) for node in memory.tree.walk("n")]
    return memory.pool.num_free, nodes, [rendition.digest for rendition in stored_in(memory.renditions, "n")]


def test_namespaces_that_hold_nothing_any_more_are_forgotten_except_the_latest() -> None:
    """Two hundred tenants, once each: only those whose pages are there are listed, and few others remembered."""
    pool = PagePool([], num_pages=32, page_size=4)
    memory = Memory(pool, ttl_s=None, rendition_bytes=2**20)
    for tenant in range(200):
        name, tokens = f"tenant {tenant}", np.arange(8, dtype=np.int32)
        memory.tree.match(name, tokens)
        sequence = KVSequence(pool, tokens)
        memory.make_writable(sequence, 0, 8)
        memory.tree.insert(name, tokens, sequence.pages)
        memory.renditions.put(
            name, Segment((1, 2)), signature="s", start=0, pages=sequence.pages[:1], offset=0, fidelity=Fidelity.EXACT
        )
        sequence.release()
    listed = memory.tree.namespaces()
    assert listed == tuple(f"tenant {tenant}" for tenant in range(200 - len(listed), 200))
    assert 10 < len(listed) < 40
    assert len(memory.tree._namespaces) <= len(listed) + 33
    assert len(memory.renditions._spaces) <= 33
    total = memory.tree.total_usage()
    assert total.query_tokens == 200 * 8
    assert total.num_tokens + total.evicted_tokens == 200 * 8
    gone = 200 - len(listed) - 1
    assert memory.tree.look(f"tenant {gone}", range(8)).reason is MissReason.EVICTED
    assert memory.tree.look("tenant 0", range(8)).reason is MissReason.NEW
    memory.reset()
    assert memory.tree.namespaces() == ()
    memory.check_integrity([])
