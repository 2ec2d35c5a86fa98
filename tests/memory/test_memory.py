"""What pool, tree and segments do together."""

from __future__ import annotations

import numpy as np

from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PagePool
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import Sequence


def test_pages_that_tree_and_segments_share_can_be_had_back() -> None:
    """Each of them passed over what the other held too, so a pool full of caches looked exhausted."""
    pool = PagePool([], num_pages=4, page_size=4)
    memory = Memory(pool, ttl_s=None, segment_bytes=2**20)
    tokens = np.arange(16, dtype=np.int32)
    pages = pool.allocate(4)
    memory.tree.insert("n", tokens, pages)
    segment = Segment(tuple(tokens.tolist()))
    memory.segments.put("n", segment, signature="s", start=0, pages=pages, offset=0, fidelity=Fidelity.EXACT)
    pool.release(pages)
    assert pool.num_free == 0

    sequence = Sequence(pool, range(100, 112))
    memory.make_writable(sequence, 0, 12)

    assert sequence.num_pages == 3
    memory.check_integrity([sequence.pages])
