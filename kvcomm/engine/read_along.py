"""Open prompts of one engine: what becomes of them from step to step, and what of them a step computes.

Reading along is done with what is spare. Beside answers in progress it takes the rows that `Spare` allows, in chunks
that are worth their pass; nothing is read while anybody waits for a first token; where nobody decodes, whole chunks are
read. A pool that is full takes the pages of open prompts back: what was read is read again, or computed by the request.

Called by the engine's thread under its lock, but for what is said to be called by others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from kvcomm.config import EngineConfig
from kvcomm.engine.passes import Work
from kvcomm.engine.reading import Reading, nothing_to_begin, overdue
from kvcomm.engine.request import Request
from kvcomm.engine.spare import MIN_CHUNK, Spare
from kvcomm.errors import PoolExhausted, RequestCancelled, kept
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PageIds
from kvcomm.memory.sequences import KVSequence, num_common
from kvcomm.model.live import Weights
from kvcomm.model.runner import Run
from kvcomm.reuse.plan import Plan, Reason

MAX_WAIT_S = 3600.0
"""However far away a deadline is: a thread cannot wait for ever with a limit."""

logger = logging.getLogger("kvcomm.engine")


class ReadAlong:
    """The open prompts.

    What always holds: a reading is in the list until it is over; one that is over holds no pages.

    Attributes:
        readings: every open prompt, the oldest first. Changed under the lock; where there are none, nothing else here
            needs to be asked.
    """

    def __init__(
        self,
        memory: Memory,
        config: EngineConfig,
        spare: Spare,
        *,
        require_weights: Callable[[Weights], None],
        require_quota: Callable[[str, int], None],
    ) -> None:
        """Make one.

        Args:
            require_weights: raises where the model has others now.
            require_quota: raises where a tenant's quota leaves no room for so many more pages.
        """
        self._memory = memory
        self._pool = memory.pool
        self._config = config
        self._spare = spare
        self._require_weights = require_weights
        self._require_quota = require_quota
        self.readings: list[Reading] = []
        self._is_touched = False

    @property
    def has_work(self) -> bool:
        """Whether a step would find anything to do, though no request is in progress. Safe to call without the lock."""
        # While a pass writes into one there is something to come, also where its user has forgotten it meanwhile.
        return self._is_touched or any(
            self._wants(each) or each.is_in_pass or overdue(each) is not None for each in self.readings.copy()
        )

    @property
    def wants_more(self) -> bool:
        """Whether anything would be read, or will be as soon as an answer goes on."""
        return any(self._may_read(each) and (each.num_unread > 0 or each.is_waiting) for each in self.readings)

    @property
    def next_due_s(self) -> float | None:
        """Seconds until the next one has been open for too long; None: there is none. Safe to call without the lock."""
        due = [each.due_s for each in self.readings.copy() if not each.is_begun]
        return min(MAX_WAIT_S, max(0.0, min(due) - time.monotonic())) if due else None

    def touch(self) -> None:
        """Something has changed that readings depend on: text, a source, a wish. By any thread, under the lock."""
        self._is_touched = bool(self.readings)

    def add(self, reading: Reading) -> None:
        """A prompt has been opened. By any thread, under the lock."""
        self.readings.append(reading)
        self.touch()

    def tend(self) -> None:
        """Take over what has become known; end what is cancelled, hopeless or overdue; begin what is complete."""
        self._is_touched = False
        for reading in self.readings.copy():
            if reading.is_begun or reading.is_over:
                continue
            error = self._ending(reading)
            if error is not None:
                self.end(reading, error)
            elif reading.is_complete:
                self._begin(reading)

    def begin_now(self, reading: Reading) -> None:
        """Make the request of a prompt that was just closed, if it is complete. By any thread, under the lock.

        Raises:
            KVCommError: it cannot be made; the prompt is given up.
        """
        self.touch()
        try:
            if reading.prompt is None:
                reading.refresh()
            if reading.is_complete:
                self._make(reading)
        except BaseException as error:
            reading.error = kept(error)
            self.cancel(reading)
            raise

    def cancel(self, reading: Reading) -> None:
        """Nobody wants the answer of a prompt any more. By any thread, under the lock."""
        reading.cancel()
        if not reading.is_begun and not reading.is_in_pass:
            self.end(reading, _cancelled(reading))
        self.touch()

    def end(self, reading: Reading, error: BaseException | None = None) -> None:
        """Give its pages back; whoever waits for its answer is told the error. Nothing where it is over."""
        if reading.is_over:
            return
        reading.is_over = True
        reading.error = reading.error or (None if error is None else kept(error))
        reading.sequence.release()
        reading.begin = nothing_to_begin  # it knows the context, which is kept by nobody but its user
        self.readings.remove(reading)
        self.touch()  # others may follow it
        if error is not None and reading.handle is not None and not reading.is_begun and not reading.handle.done:
            reading.handle.settle(error)

    def close(self, error: BaseException) -> None:
        """End all of them."""
        for reading in self.readings.copy():
            self.end(reading, error)

    def num_usable(self, request: Request) -> int:
        """Leading tokens of a request's prompt that were read along; the last one is always computed."""
        if request.reading is None:
            return 0
        tokens = request.sequence.token_ids
        return request.reading.num_usable(request.namespace, tokens[: max(0, len(tokens) - 1)])

    def share(self, request: Request) -> None:
        """Let a request have what was read of its prompt, as far as that is more than it has already."""
        reading, sequence, num_tokens = request.reading, request.sequence, self.num_usable(request)
        if reading is not None and num_tokens > sequence.num_computed:
            sequence.adopt(reading.sequence.pages[: -(-num_tokens // self._pool.page_size)], num_tokens)

    def num_read(self, request: Request, num_before: int) -> int:
        """Tokens that count of a request's prompt, and that were computed for it before it was complete.

        Also where a full pool took them back, and they came from the tree.

        Args:
            num_before: tokens of a context that counted already.
        """
        reading = request.reading
        if reading is None or reading.is_over or reading.namespace != request.namespace:
            return 0
        num_own = min(reading.num_own, reading.num_alike(request.sequence.token_ids))
        return max(0, min(request.sequence.num_computed, num_own) - max(num_before, reading.num_shared))

    def told(self, reading: Reading, plan: Plan) -> Plan:
        """A plan in which followed text that was not read has the reason for that."""
        reason = Reason.NO_SPARE if reading.was_denied else Reason.TOO_LATE
        for start, end in reading.followed:
            plan = plan.explained(start, end, Reason.NEW, reason)
        return plan

    def work(self, digest: str, num_answer_rows: int, num_answers: int) -> list[Work]:
        """Chunks for the next pass, which is for these weights, beside so many rows of so many answers."""
        wanting = self._wanting(digest)
        budget = self._config.prefill_chunk
        if num_answer_rows:
            budget = self._spare.num_rows(num_answer_rows, num_answers)
            num_wanted = sum(reading.num_unread for reading in wanting)
            if all(reading.is_waiting for reading in wanting) and num_wanted < MIN_CHUNK:
                return []  # more will come soon, and a chunk is cheaper by the row
            if budget < min(self._spare.chunk, num_wanted):
                for reading in wanting:
                    reading.was_denied = True
                return []
        batch: list[Work] = []
        for reading in wanting:
            with self._on_behalf_of(reading):
                work = self._chunk(reading, budget)
                if work is not None:
                    budget -= work.num_tokens
                    batch.append(work)
        return batch

    def computed(self, reading: Reading, run: Run) -> None:
        """A pass has computed a chunk."""
        reading.is_in_pass = False
        if reading.is_over:
            return
        reading.count(run.start, run.token_ids)
        try:
            self._remember(reading)
        except Exception as error:
            self.spoil(reading, error)

    def spoil(self, reading: Reading, error: BaseException) -> None:
        """Reading has failed: it goes no further, and the request computes its prompt itself."""
        logger.warning("an open prompt is read no further, its request will compute it: %r", error)
        reading.is_spoiled, reading.is_in_pass = True, False
        reading.sequence.release()

    def digests(self) -> list[str]:
        """Digests of the weights of those that could be read on."""
        return list(dict.fromkeys(each.weights.digest for each in self.readings if self._wants(each)))

    def give_way(self) -> bool:
        """Take the pages of the youngest one that has any of its own, for others; False: there is none."""
        for reading in reversed(self.readings):
            if not reading.is_begun and reading.sequence.num_pages:
                reading.sequence.release()
                reading.num_cached = 0
                reading.has_no_room = self._pool.num_free
                return True
        return False

    def droppable_pages(self) -> list[PageIds]:
        """Page references that `give_way` would give back, sooner or later."""
        return [each.sequence.pages for each in self.readings if not each.is_begun]

    def sequences(self) -> Iterator[tuple[str, KVSequence]]:
        """Whose they are and the sequences, for quotas and integrity checks."""
        return ((each.owner, each.sequence) for each in self.readings)

    def reclaim(self) -> None:
        """End those that their users have forgotten."""
        for reading in self.readings.copy():
            if reading.is_cancelled and not reading.is_begun and not reading.is_in_pass:
                self.end(reading, _cancelled(reading))

    def _ending(self, reading: Reading) -> BaseException | None:
        if reading.is_cancelled:
            return _cancelled(reading)
        late = overdue(reading)
        if late is not None:
            return late
        try:
            if reading.prompt is None:
                reading.refresh()
        except Exception as error:  # whatever a prompt is made of concerns nobody but who opened it
            return error
        return None

    def _begin(self, reading: Reading) -> None:
        try:
            self._make(reading)
        except BaseException as error:  # what is wrong with a prompt concerns nobody but who asked for its answer
            self.end(reading, error)

    def _make(self, reading: Reading) -> None:
        segments = tuple(reading.segments) if reading.prompt is None else reading.prompt
        reading.begin(reading, segments)
        reading.is_begun = True

    def _wants(self, reading: Reading) -> bool:
        """Whether there is something to read, and room for it as far as is known."""
        return reading.num_unread > 0 and self._may_read(reading)

    def _may_read(self, reading: Reading) -> bool:
        is_stuck = reading.has_no_room is not None and self._pool.num_free <= reading.has_no_room
        return not (reading.is_begun or reading.is_over or reading.is_spoiled or reading.is_cancelled or is_stuck)

    def _wanting(self, digest: str) -> list[Reading]:
        """Those that a pass for these weights may read on, the most urgent first; they have what the tree has.

        Of what they can share only the first one reads.
        """
        found: list[Reading] = []
        before: list[Reading] = []
        for reading in sorted(self.readings, key=_distance):
            if reading.weights.digest == digest and self._wants(reading):
                if not self._is_in_flight(reading, before):
                    with self._on_behalf_of(reading):
                        self._share_from_tree(reading)
                        found += [reading] if reading.num_unread else []
                before.append(reading)
        return found

    def _is_in_flight(self, reading: Reading, others: Iterable[Reading]) -> bool:
        """Whether another one is about to leave at least a page in the tree that this one could share."""
        if not self._uses_tree(reading):
            return False
        own = reading.sequence.token_ids[: reading.num_final]
        for other in others:
            if other.namespace != reading.namespace or not self._uses_tree(other):
                continue
            theirs = other.sequence.token_ids[: other.num_final]
            num_shared = num_common(own, theirs) // self._pool.page_size * self._pool.page_size
            if num_shared > max(reading.sequence.num_computed, other.sequence.num_computed):
                return True
        return False

    def _uses_tree(self, reading: Reading) -> bool:
        return self._config.cache and reading.sequence.fidelity is Fidelity.EXACT

    @contextmanager
    def _on_behalf_of(self, reading: Reading) -> Iterator[None]:
        """What fails where one prompt is prepared concerns nobody else's answer."""
        try:
            yield
        except Exception as error:
            self.spoil(reading, error)

    def _chunk(self, reading: Reading, budget: int) -> Work | None:
        if budget < 1:
            reading.was_denied = True
            return None
        sequence = reading.sequence
        start, end = sequence.num_computed, sequence.num_computed + min(budget, reading.num_unread)
        try:
            self._require_quota(reading.owner, sequence.num_missing_pages(end))
            self._memory.make_writable(sequence, start, end)
        except PoolExhausted:
            reading.has_no_room, reading.was_denied = self._pool.num_free, True
            return None
        reading.has_no_room, reading.was_denied, reading.is_in_pass = None, False, True
        tokens = sequence.token_ids[start:end].copy()
        return Work(reading, None, sequence, (Run(tokens, sequence.pages.copy(), start, 0),), is_beside=True)

    def _share_from_tree(self, reading: Reading) -> None:
        sequence = reading.sequence
        if self._uses_tree(reading) and reading.num_final > sequence.num_computed:
            match = self._memory.tree.match(reading.namespace, sequence.token_ids[: reading.num_final])
            if match.num_tokens > sequence.num_computed:
                sequence.adopt(match.pages, match.num_tokens)
                if match.num_tokens > reading.num_own:
                    reading.num_shared = match.num_tokens

    def _remember(self, reading: Reading) -> None:
        """Put what is final, exact and computed into the tree, page by page."""
        sequence, page_size = reading.sequence, self._pool.page_size
        num_tokens = min(sequence.num_computed, reading.num_final) // page_size * page_size
        if self._uses_tree(reading) and num_tokens > reading.num_cached:
            self._require_weights(reading.weights)
            pages = sequence.pages[: num_tokens // page_size]
            self._memory.tree.insert(reading.namespace, sequence.token_ids[:num_tokens], pages)
            reading.num_cached = num_tokens


def _cancelled(reading: Reading) -> BaseException:
    if reading.error is not None:
        return kept(reading.error)
    return RequestCancelled(f"open prompt {reading.request_id} was cancelled")


def _distance(reading: Reading) -> tuple[int, int]:
    """Those come first that lack least until their answer can begin, then the oldest."""
    return len(reading.parts) - reading.num_parts, reading.request_id
