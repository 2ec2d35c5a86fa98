"""Write-behind: exact prefixes and renditions that the engine has computed go to a shared tier, in the tier's thread.

What waits there refers to pages of the pool, so nobody changes them before they are copied out. It refers to a share of
the pool at most, and gives way whenever pages are needed: what is dropped is computed again by whoever wants it, and
nothing else. All but `close` is called under the engine's lock, or takes it; KV is copied without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from threading import RLock

from kvcomm.errors import PoolExhausted
from kvcomm.memory.pool import PageIds, PagePool
from kvcomm.memory.renditions import Rendition
from kvcomm.memory.segments import Segment
from kvcomm.model.attention.contract import IntArray
from kvcomm.tiers.tier import KV, RenditionName, Tier, TierSpace
from kvcomm.tiers.write_queue import WriteTask

MAX_SHARE = 0.25
"""Of the pool's pages, that several prefixes and renditions together may refer to while they wait."""


@dataclass(eq=False)
class Held:
    """KV that waits to be written.

    Attributes:
        pages: retained once; None: given back.
        end: one past the last slot that it takes of them.
        is_copied: its pages are being read now.
    """

    pages: PageIds | None
    end: int
    is_copied: bool = False


class WriteBehind:
    """What one engine has given its tier to write."""

    def __init__(self, tier: Tier, pool: PagePool, lock: RLock) -> None:
        self._tier = tier
        self._pool = pool
        self._lock = lock
        self._held: dict[int, Held] = {}  # by id, those first that have waited longest
        self._is_closed = False

    def num_whole(self, num_tokens: int) -> int:
        """Tokens of the whole runs of so many."""
        return num_tokens // self._tier.run_tokens * self._tier.run_tokens

    def offer(self, space: TierSpace, token_ids: IntArray, pages: PageIds) -> None:
        """Let the tier write an exact prefix, as far as it is not known to be there.

        Args:
            token_ids: whole runs.
            pages: of at least these tokens.
        """
        held = self._hold(pages[: -(-len(token_ids) // self._pool.page_size)], len(token_ids))
        if held is not None:
            tokens, load = token_ids.tolist(), partial(self._copied, held)
            self._tier.put_prefix_later(space, tokens, load, ended=partial(self._ended, held))

    def offer_rendition(self, space: TierSpace, segment: Segment, rendition: Rendition) -> None:
        """Let the tier write a rendition of a whole segment; of a part of one others could not tell what is missing."""
        if rendition.num_tokens < len(segment.token_ids) or not self._tier.serves(space.tenant):
            return
        held = self._hold(rendition.pages, rendition.offset + rendition.num_tokens)
        if held is not None:
            name = RenditionName(segment.digest(space.namespace), rendition.signature, rendition.start)
            write = partial(self._write_rendition, space, name, segment, rendition, held)
            self._tier.queue.add(
                WriteTask(f"rendition {name} {rendition.fidelity}", 0, write, partial(self._ended, held))
            )

    def give_way(self) -> bool:
        """Give up what has waited longest, so that its pages may come free; False if nothing waits."""
        held = next(self._droppable(), None)
        if held is None:
            return False
        self._give_back(held)
        return True

    def droppable_pages(self) -> list[PageIds]:
        """Page references that `give_way` would give back, sooner or later."""
        return [held.pages for held in self._droppable() if held.pages is not None]

    def pages_held(self) -> Iterator[PageIds]:
        """Every page reference, for integrity checks."""
        yield from (held.pages for held in self._held.values() if held.pages is not None)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was offered is written, or given up; False after `timeout_s`. Not under the lock."""
        return self._tier.queue.flush(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Wait so many seconds at most for what is to be written, and give up the rest. Not under the lock."""
        self.flush(timeout_s)
        with self._lock:
            self._is_closed = True
            while self.give_way():
                pass

    def _hold(self, pages: PageIds, end: int) -> Held | None:
        """Keep pages as they are until they are copied; None: there is no room for them in the queue.

        What is alone in the queue may be of any size.
        """
        if not end or self._is_closed:
            return None
        while self._held and self._num_held() + pages.size > self._pool.num_pages * MAX_SHARE:
            if not self.give_way():
                return None
        held = Held(pages.copy(), end)
        self._pool.retain(pages)
        self._held[id(held)] = held
        return held

    def _write_rendition(
        self, space: TierSpace, name: RenditionName, segment: Segment, rendition: Rendition, held: Held
    ) -> None:
        kv, tokens = self._copied(held, rendition.offset), segment.token_ids
        slot, before, risk = rendition.slot, rendition.before, rendition.risk
        if math.isfinite(risk):
            self._tier.put_rendition(space, name, tokens, kv, rendition.fidelity, slot=slot, before=before, risk=risk)

    def _droppable(self) -> Iterator[Held]:
        return (held for held in self._held.values() if not held.is_copied)

    def _num_held(self) -> int:
        return sum(held.pages.size for held in self._held.values() if held.pages is not None)

    def _copied(self, held: Held, start: int) -> KV:
        """KV of its slots from `start` on, on the CPU. Raises PoolExhausted: its pages were needed."""
        with self._lock:
            if held.pages is None:
                raise PoolExhausted("its pages were needed before they were copied")
            pages, held.is_copied = held.pages, True
        try:
            kv = self._copy(pages, start, held.end)
        finally:
            with self._lock:
                self._give_back(held)
        return kv

    def _copy(self, pages: PageIds, start: int, end: int) -> KV:
        first = start // self._pool.page_size
        offset = start - first * self._pool.page_size
        slots = self._pool.slots(pages[first:], end - first * self._pool.page_size)
        keys = [layer[slots][offset:].to("cpu", copy=True) for layer in self._pool.keys]
        return KV(keys, [layer[slots][offset:].to("cpu", copy=True) for layer in self._pool.values])

    def _ended(self, held: Held) -> None:
        with self._lock:
            self._give_back(held)

    def _give_back(self, held: Held) -> None:
        self._held.pop(id(held), None)
        if held.pages is not None:
            pages, held.pages = held.pages, None
            self._pool.release(pages)
