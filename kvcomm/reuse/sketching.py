"""Sketches ahead: text that was just published is sketched beside requests.

Whoever moves a text looks for the anchors of its tokens by sketches, which follow from its source alone. Made at once
they take a third of the time that moving takes; here they are made before anybody waits for them, the newest text
first. A sketch lives as long as its rendition. What is not made in time is made when it is needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock

from kvcomm.align.bank import AnchorStore
from kvcomm.align.ops.contract import LayerStore, Place
from kvcomm.align.sketch import Sketcher
from kvcomm.align.spans import place_of
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PageIds
from kvcomm.memory.renditions import Rendition
from kvcomm.memory.segments import Segment
from kvcomm.reuse.idle_work import IdleWork, Job, Steps, Urgency

MAX_WAITING = 64
"""Texts that wait for their sketches; beyond that the oldest one goes without."""


class SketchAhead:
    """Makes the sketches of one engine's published texts. One job at a time works on all of them.

    Holds the pages of a text only while it is sketched; what has gone from the cache by then is passed over.
    """

    def __init__(
        self,
        memory: Memory,
        layers: Sequence[LayerStore],
        sketcher: Sketcher,
        anchors: AnchorStore,
        idle: IdleWork,
        lock: RLock,
    ) -> None:
        self._memory = memory
        self._layers = layers
        self._sketcher = sketcher
        self._anchors = anchors
        self._idle = idle
        self._lock = lock
        self._waiting: deque[tuple[str, Segment, Rendition]] = deque(maxlen=MAX_WAITING)
        self._held: list[PageIds] = []
        self._is_queued = False

    def published(self, namespace: str, segment: Segment, rendition: Rendition) -> None:
        """A text has been published; where nothing has ever been taught nobody needs its sketches. Under the lock."""
        if next(self._anchors.banks(namespace), None) is None:
            return
        self._waiting.append((namespace, segment, rendition))
        if not self._is_queued:
            self._is_queued = True
            self._idle.add(Job(self._steps(), self._end, lambda: self._held, Urgency.AHEAD))

    def _steps(self) -> Steps:
        while True:
            with self._taken() as place:
                if place is None:
                    return
                self._sketcher.prepare(self._layers, place)
            yield

    @contextmanager
    def _taken(self) -> Iterator[Place | None]:
        """Where the newest text that waits lies, its pages held; None: there is none."""
        with self._lock:
            place = self._take()
        try:
            yield place
        finally:
            with self._lock:
                for pages in self._held:
                    self._memory.pool.release(pages)
                self._held.clear()

    def _take(self) -> Place | None:
        pool = self._memory.pool
        while self._waiting:
            namespace, segment, each = self._waiting.pop()
            if any(known is each for known in self._memory.renditions.renditions_of(namespace, segment)):
                pages = each.pages.copy()
                pool.retain(pages)
                self._held.append(pages)
                return place_of(pool, pages, each.offset, each.num_tokens, position=each.start, owner=each.identity)
        return None

    def _end(self) -> None:
        self._is_queued = False
        self._waiting.clear()
