"""Read-ahead: what a shared tier has of a waiting prompt is fetched before it is computed, or beside that.

A request waits for the tier for a small share of the time that computing takes, and not at all where the tier is
expected to take longer for its first run of tokens. Each run that comes has saved the time of computing it, and the
request waits so much longer for the next one. From then on it is computed, in pieces where something is about to come:
what comes is used for all that is not computed yet, and by others. So a tier that is gone or slow, or becomes so in the
middle, costs a first token a few hundredths of its time, and never an answer.

Everything fetched goes into the tree of exact prefixes, the same as if it had been computed here; requests find it
there. Methods but `close` are called under the engine's lock, which the reading thread does not hold while it asks the
tier and writes pages.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import RLock

import numpy as np
import torch

from kvcomm.errors import PoolExhausted
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PageIds
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.attention.contract import IntArray
from kvcomm.reuse.cost import ReuseCost
from kvcomm.reuse.plan import Reason
from kvcomm.tiers.tier import KV, StoredRendition, Tier, TierMiss, TierSpace

logger = logging.getLogger("kvcomm.tiers")

WAIT_SHARE = 0.025
"""Of the time that computing takes, that a request waits for the tier at most while nothing comes."""

SAVED_SHARE = 0.9
"""Of the time that what has come has saved, that it waits for more."""

RACE_SHARE = 0.02
"""Of that time, that computing in pieces beside the tier may cost."""

MAX_WAIT_S = 2.0
"""However long the prompt."""

MIN_ROWS = 64
"""Of a pass that tells how busy the machine is."""

BUSY_S = 30.0
"""Seconds for which that is believed."""

MAX_BUSYNESS = 20.0
"""Times as long as on an idle machine; what took longer was something else, such as the first pass of all."""

MAX_RENDITIONS = 2
"""Of one segment, that are fetched."""

MIN_SEGMENT = 16
"""Tokens of a segment of which a rendition is worth a look."""

OVERDUE = 4.0
"""An answer that takes so many times as long as computing holds up the others: nobody new waits for them."""

MIN_DEADLINE_S = 0.05
"""For whatever is asked of the tier in the reading thread."""

REASONS = {
    TierMiss.ABSENT: Reason.TIER_FAILED,
    TierMiss.CORRUPT: Reason.TIER_CORRUPT,
    TierMiss.FOREIGN: Reason.TIER_CORRUPT,
    TierMiss.TOO_NEW: Reason.TIER_CORRUPT,
    TierMiss.FAILED: Reason.TIER_FAILED,
    TierMiss.SLOW: Reason.TIER_SLOW,
    TierMiss.REFUSED: Reason.TIER_FAILED,
}
"""What a user is told where the tier had something and did not give it."""


@dataclass(eq=False)
class Ask:
    """What one request wants to know of the tier.

    Attributes:
        token_ids: of the prompt but its last token, which is computed whatever is cached.
        num_local: of these, cached here when it was asked.
        asked_s: on the monotonic clock.
        exact_s: predicted seconds of computing what is not cached here; None: not known yet.
        first_s: predicted seconds until the first of it can be here; None: nothing is known of the tier's pace.
        expected_s: predicted seconds until the tier has given all it can have; None as above.
        saved_s: predicted seconds of computing what the tier has given so far.
        num_there: leading tokens that the tier has; None: not known yet.
        num_placed: leading tokens that are cached here since the tier gave the last of them.
        spans: `[start, end)` of the tokens that it gave.
        reason: why some of what it has was not had; None: nothing went wrong so far.
        is_settled: nothing more comes.
        is_given_up: nobody wants it any more.
        num_raced: passes that were computed in pieces meanwhile.
        segments: of which a rendition is wanted: they might be moved, and none is here.
    """

    namespace: str
    space: TierSpace
    token_ids: IntArray
    num_local: int
    asked_s: float
    exact_s: float | None = None
    first_s: float | None = None
    expected_s: float | None = None
    saved_s: float = 0.0
    num_there: int | None = None
    num_placed: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    reason: Reason | None = None
    is_settled: bool = False
    is_given_up: bool = False
    num_raced: int = 0
    segments: tuple[Segment, ...] = ()

    @property
    def waits_until_s(self) -> float:
        """When its request is computed without the tier, on the monotonic clock."""
        if self.is_settled or self.exact_s is None:
            return -np.inf
        patience_s = min(MAX_WAIT_S, WAIT_SHARE * self.exact_s)
        is_hopeless = self.first_s is not None and self.first_s > patience_s
        return self.asked_s + (0.0 if is_hopeless else patience_s + SAVED_SHARE * self.saved_s)

    @property
    def left_s(self) -> float:
        """Seconds until it is expected to be settled; where nothing is known, as long as its request waits."""
        expected_s = WAIT_SHARE * (self.exact_s or 0.0) if self.expected_s is None else self.expected_s
        return max(expected_s - (time.monotonic() - self.asked_s), expected_s / 2)

    def num_tokens(self, start: int, end: int) -> int:
        """Tokens of `[start, end)` that the tier gave."""
        return sum(max(0, min(end, last) - max(start, first)) for first, last in self.spans)


class ReadAhead:
    """Asks of requests that wait, and the thread that answers them from one tier."""

    def __init__(self, tier: Tier, memory: Memory, cost: ReuseCost, lock: RLock) -> None:
        self._tier = tier
        self._memory = memory
        self._cost = cost
        self._lock = lock
        self._asks: deque[Ask] = deque()
        self._filling: KVSequence | None = None
        self._overdue_s = np.inf  # when what is being answered will have taken too long
        self._slowdown, self._slowdown_at_s = 1.0, -np.inf
        self._changed = threading.Condition(lock)
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def ask(
        self, namespace: str, space: TierSpace, token_ids: IntArray, segments: Iterable[Segment] = ()
    ) -> Ask | None:
        """Ask for a prompt; None where the tier cannot have more of it than is cached here.

        Args:
            token_ids: of the prompt but its last token.
            segments: of it that might be moved.
        """
        num_there_at_most = len(token_ids) // self._tier.run_tokens * self._tier.run_tokens
        num_local = self._memory.tree.look(namespace, token_ids).num_tokens
        wanted = self._unknown(namespace, segments)
        has_nothing = num_there_at_most <= num_local and not wanted
        if self._is_closed or has_nothing or not self._tier.serves(space.tenant):
            return None
        tokens = np.array(token_ids, dtype=np.int32)
        ask = Ask(namespace, space, tokens, num_local, time.monotonic(), segments=wanted)
        if self._cost.model is not None:
            self._begin(ask)
        return ask

    def computed(self, stretches: Sequence[tuple[int, int]], seconds: float) -> None:
        """A pass over stretches of prompts has taken so long; on a busy machine that is more than predicted."""
        if self._cost.model is not None and sum(end - start for start, end in stretches) >= MIN_ROWS:
            predicted_s = self._cost.model.compute_s(stretches)
            self._slowdown = min(MAX_BUSYNESS, max(1.0, seconds / predicted_s)) if predicted_s > 0 else 1.0
            self._slowdown_at_s = time.monotonic()

    def must_wait(self, ask: Ask) -> bool:
        """Whether its request should rather wait than be computed now."""
        if self._is_closed:
            return False
        if ask.exact_s is None:  # by now the machine has been measured, or cannot be
            self._begin(ask)
        return time.monotonic() < ask.waits_until_s

    def num_next(self, ask: Ask, start: int, end: int) -> int:
        """Tokens of `[start, end)` to compute in the next pass, so that what comes meanwhile is of use."""
        model, left = self._cost.model, end - start
        if ask.is_settled or model is None or ask.exact_s is None:
            return left
        if (ask.num_raced + 1) * model.pass_s * self._busyness > RACE_SHARE * ask.exact_s:
            return left
        token_s, left_s = model.row_s + model.pair_s * end, ask.left_s / self._busyness
        num_tokens = int(max(0.0, left_s - model.pass_s) / token_s) if token_s > 0 else left
        if num_tokens >= left:
            return left
        ask.num_raced += 1
        page_size = self._memory.pool.page_size
        return min(left, max(page_size, num_tokens // page_size * page_size))

    def give_up(self, ask: Ask) -> None:
        """Its request needs nothing more: it is computed, or has failed."""
        ask.is_given_up = True
        if ask in self._asks:
            self._asks.remove(ask)

    def rest(self, until_s: float) -> None:
        """Wait until something is answered or asked, or that moment comes, with the engine's lock given back."""
        if not self._is_closed:
            self._changed.wait(max(0.0, until_s - time.monotonic()))

    def wake(self) -> None:
        """Let nobody rest any longer."""
        self._changed.notify_all()

    def pages_held(self) -> Iterator[PageIds]:
        """Page references of what is being written into the pool, for integrity checks."""
        if self._filling is not None:
            yield self._filling.pages

    def close(self) -> None:
        """Answer nothing more, and let nobody wait for it. What is being asked of the tier then ends by itself."""
        with self._lock:
            self._is_closed = True
            while self._asks:
                self._settle(self._asks.popleft(), Reason.TIER_SLOW)
            self._changed.notify_all()

    @property
    def _busyness(self) -> float:
        """How many times as long passes take as on a machine that does nothing else."""
        if time.monotonic() - self._slowdown_at_s < BUSY_S:
            return self._slowdown
        return min(MAX_BUSYNESS, max(1.0, _load()))

    def _begin(self, ask: Ask) -> None:
        """Put an ask in the queue, unless the tier is not worth it."""
        model, run_tokens = self._cost.model, self._tier.run_tokens
        if model is None:
            self._settle(ask, Reason.TIER_SLOW)
            return
        busyness = self._busyness
        ask.exact_s = busyness * model.compute_s([(ask.num_local, len(ask.token_ids) + 1)])
        first, last = ask.num_local // run_tokens * run_tokens, len(ask.token_ids) // run_tokens * run_tokens
        num_moved = sum(len(segment.token_ids) for segment in ask.segments)
        num_bytes = (max(0, last - first) + num_moved) * ask.space.token_bytes
        end = max(last, min(ask.num_local + num_moved, len(ask.token_ids)))
        saved_s = busyness * (model.compute_s([(ask.num_local, end)]) - model.pass_s)
        is_stuck = time.monotonic() > self._overdue_s
        if self._is_closed or is_stuck or not self._tier.is_worth(num_bytes, saved_s):
            self._settle(ask, Reason.TIER_SLOW)
            return
        ask.first_s = self._tier.reads.expected_s(min(num_bytes, run_tokens * ask.space.token_bytes))
        ask.expected_s = self._tier.reads.expected_s(num_bytes)
        self._asks.append(ask)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kvcomm-tier-reader", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _settle(self, ask: Ask, reason: Reason | None) -> None:
        ask.reason, ask.is_settled = reason, True
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._is_closed or self._asks)
                if self._is_closed:
                    return
                ask = self._asks.popleft()
                self._overdue_s = time.monotonic() + OVERDUE * max(MIN_DEADLINE_S, ask.exact_s or 0.0)
            reason: Reason | None = Reason.TIER_FAILED
            try:
                reason = self._answer(ask)
            except Exception:  # a tier never raises; whatever this was, the request is computed
                logger.exception("what the tier has of a prompt could not be taken over")
            finally:
                with self._lock:
                    self._overdue_s = np.inf
                    self._settle(ask, reason)

    def _answer(self, ask: Ask) -> Reason | None:
        """Fetch what the tier has and this engine lacks; why a prefix was not had, if it was not."""
        reason = self._fetch_prefix(ask)
        for segment in ask.segments:
            if self._is_wanted(ask):
                self._fetch_rendition(ask, segment)
        return reason

    def _is_wanted(self, ask: Ask) -> bool:
        return not (ask.is_given_up or self._is_closed)

    def _fetch_rendition(self, ask: Ask, segment: Segment) -> None:
        digest, deadline_s = segment.digest(ask.space.namespace), max(MIN_DEADLINE_S, ask.exact_s or 0.0)
        names = self._tier.list_renditions(ask.space, digest, allows_approximate=True)
        for name in names[:MAX_RENDITIONS]:
            got = self._tier.get_rendition(ask.space, name, allows_approximate=True, deadline_s=deadline_s)
            if isinstance(got, StoredRendition) and got.token_ids == segment.token_ids:
                self._keep_rendition(ask.namespace, segment, got)

    def _keep_rendition(self, namespace: str, segment: Segment, stored: StoredRendition) -> None:
        """Let requests move what was fetched, if there is room for it; what is approximate stays so."""
        pool, num_tokens = self._memory.pool, len(segment.token_ids)
        sequence = KVSequence(pool, segment.token_ids)
        with self._lock:
            try:
                self._memory.make_writable(sequence, 0, num_tokens)
            except PoolExhausted:
                return
            self._filling = sequence
        try:
            self._write(sequence, 0, num_tokens, [stored.kv])
            with self._lock:
                self._memory.renditions.put(
                    namespace,
                    segment,
                    signature=stored.name.signature,
                    start=stored.name.position,
                    pages=sequence.pages,
                    offset=0,
                    fidelity=stored.fidelity,
                    risk=stored.risk,
                    slot=stored.slot,
                    before=stored.before,
                    context=sequence.identity,
                )
        finally:
            with self._lock:
                self._filling = None
                sequence.release()

    def _unknown(self, namespace: str, segments: Iterable[Segment]) -> tuple[Segment, ...]:
        """Those of some segments of which nothing can be moved from here."""
        found = {
            segment.token_ids: segment
            for segment in segments
            if segment.name is not None and len(segment.token_ids) >= MIN_SEGMENT
        }
        known = self._memory.renditions
        return tuple(each for each in found.values() if not known.renditions_of(namespace, each))

    def _fetch_prefix(self, ask: Ask) -> Reason | None:
        tier, run_tokens, tokens = self._tier, self._tier.run_tokens, ask.token_ids.tolist()
        deadline_s = max(MIN_DEADLINE_S, ask.exact_s or 0.0)
        num_there = tier.prefix_length(ask.space, tokens, deadline_s=deadline_s)
        with self._lock:
            ask.num_there = num_there
            start = self._memory.tree.look(ask.namespace, ask.token_ids).num_tokens // run_tokens * run_tokens
        while start < num_there and self._is_wanted(ask):
            end = start + run_tokens
            read = tier.read_prefix(ask.space, tokens, start, end, deadline_s=deadline_s)
            if read.miss is not None:
                return REASONS[read.miss]
            if not self._place(ask, read.runs, start):
                return Reason.NO_ROOM
            start = end
        return None

    def _place(self, ask: Ask, runs: Sequence[KV], start: int) -> bool:
        """Put KV of the tokens from `start` on into the tree; False: no room, or what stood before is gone."""
        end = start + sum(run.num_tokens for run in runs)
        pool, tree = self._memory.pool, self._memory.tree
        with self._lock:
            match = tree.look(ask.namespace, ask.token_ids[:end])
            if match.num_tokens == end:
                return True  # it has been computed meanwhile
            first = match.num_tokens // pool.page_size * pool.page_size
            if first < start or self._is_closed:
                return False
            sequence = KVSequence(pool, ask.token_ids[:end])
            sequence.adopt(match.pages[: first // pool.page_size], first)
            try:
                self._memory.make_writable(sequence, first, end)
            except PoolExhausted:
                sequence.release()
                return False
            self._filling = sequence
        try:
            self._write(sequence, first, end, runs, skipped=first - start)
            with self._lock:
                sequence.count(end)
                tree.insert(ask.namespace, ask.token_ids[:end], sequence.pages)
                ask.num_placed = end
                ask.spans.append((match.num_tokens, end))
                if self._cost.model is not None:
                    saved_s = self._cost.model.compute_s([(match.num_tokens, end)]) - self._cost.model.pass_s
                    ask.saved_s += self._busyness * saved_s
                self._changed.notify_all()
        finally:
            with self._lock:
                self._filling = None
                sequence.release()
        return True

    def _write(self, sequence: KVSequence, first: int, end: int, runs: Sequence[KV], *, skipped: int = 0) -> None:
        """Put KV into the pages of positions `[first, end)` of a sequence that nobody else knows; without the lock.

        Args:
            first: where a page begins.
            skipped: leading tokens of the runs that are there already.
        """
        pool = self._memory.pool
        slots = pool.slots(sequence.pages[first // pool.page_size :], end - first)
        pieces = zip(*((*run.keys, *run.values) for run in runs), strict=True)
        for stored, parts in zip((*pool.keys, *pool.values), pieces, strict=True):
            new = parts[0] if len(parts) == 1 else torch.cat(parts)
            stored[slots] = new[skipped:].to(stored.device)


def _load() -> float:
    """Processes that want to run for each processor; 1 where the system does not say."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return 1.0
