"""Admission: which waiting request begins, what of its prompt is known already, and the pages for the rest.

A request is admitted when the pages for the longest possible answers of all its choices are there (evicting cached
prefixes if that makes enough of them), so a running request is not thrown out again; a full pool queues.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from kvcomm.config import EngineConfig
from kvcomm.engine.adapters import Adapters
from kvcomm.engine.healing_work import HealingWork
from kvcomm.engine.in_flight import InFlight
from kvcomm.engine.read_along import ReadAlong
from kvcomm.engine.request import Request
from kvcomm.engine.tiering import Tiering
from kvcomm.errors import PoolExhausted, PoolTooSmall, WeightsChanged
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.memory import Memory
from kvcomm.memory.sequences import KVSequence, num_common
from kvcomm.reuse.plan import Explanation, Reason, exact_plan
from kvcomm.reuse.planner import Planner


class Admission:
    """Takes requests in, and shares with them what is there. Called under the engine's lock."""

    def __init__(
        self,
        config: EngineConfig,
        memory: Memory,
        in_flight: InFlight,
        *,
        planner: Planner,
        adapters: Adapters,
        tiering: Tiering,
        read_along: ReadAlong,
        healing: HealingWork,
        begin_answers: Callable[[Request, Tensor], None],
    ) -> None:
        """Make one.

        Args:
            begin_answers: draws the first tokens behind a prompt whose last logits, [vocab_size], are there already.
        """
        self._config = config
        self._pool = memory.pool
        self._tree = memory.tree
        self._in_flight = in_flight
        self._planner = planner
        self._adapters = adapters
        self._tiering = tiering
        self._read_along = read_along
        self._healing = healing
        self._begin_answers = begin_answers

    def queue(self, request: Request) -> None:
        """Let a request wait for its turn. Raises PoolTooSmall: it would not fit an empty pool."""
        needed = request.num_pages(self._pool.page_size)
        if needed > self._pool.num_pages:
            answers = f"{len(request.branches)} answers" if len(request.branches) > 1 else "answer"
            raise PoolTooSmall(
                f"prompt and {answers} of up to {request.max_tokens} tokens need {needed} pages of "
                f"{self._pool.page_size}; the whole pool has {self._pool.num_pages}: "
                "lower max_new_tokens or n, shorten the prompt or raise pool_tokens"
            )
        if self._tiering.is_on and self._uses_tree(request):
            self._tiering.ask(request)
        self._in_flight.waiting.append(request)
        if self._tiering.is_on:
            self._tiering.wake()

    def admit(self) -> None:
        """Admit in order of arrival; a request whose prefix is being computed right now waits for it."""
        running = self._in_flight.running
        self._in_flight.awaits_jobs = False
        for request in list(self._in_flight.waiting):
            if len(running) >= self._config.max_running:
                return
            with self._in_flight.on_behalf_of(request):
                if self._must_wait(request):
                    continue
                try:
                    self._renew_weights(request)
                    self._take_pages(request)
                except PoolExhausted as error:
                    if running or self._in_flight.waits_for_jobs():
                        return
                    raise self._in_flight.nothing_to_wait_for(request, error) from error
                self._in_flight.waiting.remove(request)
                running.append(request)
                request.clock.admitted = time.monotonic()
                if request.ready_logits is not None:
                    self._begin_answers(request, request.ready_logits)

    def explain(self, request: Request) -> Explanation:
        """What would be planned for a trial request if it were admitted now; nothing is changed or kept."""
        try:
            self._plan(request)
            return self._planner.explain(request)
        finally:
            self._in_flight.drop_attempt(request)
            request.sequence.release()

    def take_news(self, request: Request) -> None:
        """Share what a tier has given of a prompt since it was begun, instead of computing that."""
        sequence, page_size = request.sequence, self._pool.page_size
        if not self._tiering.has_news(request):
            return
        before = sequence.num_computed
        match = self._tree.match(request.namespace, sequence.token_ids[:-1])
        num_tokens = match.num_tokens // page_size * page_size
        if num_tokens > before:
            sequence.adopt(match.pages[: num_tokens // page_size], num_tokens)
            request.plan = request.plan.reused(before, num_tokens)
            request.pending = [(max(start, num_tokens), end) for start, end in request.pending if end > num_tokens]

    def _must_wait(self, request: Request) -> bool:
        return (
            (request.ask is not None and self._tiering.must_wait(request))
            or self._is_prefix_in_flight(request)
            or (request.may_move and self._planner.waits_for_source(request, self._in_flight.running))
        )

    def _renew_weights(self, request: Request) -> None:
        """Let a request that has waited mean the weights that there are, if those that it meant are gone.

        Raises:
            WeightsChanged: it goes on with KV of the former ones.
            UnknownAdapter, UnsupportedModel: see `Adapters.weights`.
        """
        try:
            self._adapters.live.require(request.weights)
        except WeightsChanged:
            if request.num_kept_tokens:
                raise
            request.weights = self._adapters.weights(request.adapter)
            request.namespace = self._adapters.namespace(request.weights.digest, request.tenant)

    def _is_prefix_in_flight(self, request: Request) -> bool:
        """Whether a running prefill will soon leave at least a page in the tree that this request could share."""
        if not self._uses_tree(request):
            return False
        own = request.sequence
        for other in self._in_flight.running:
            if other.is_prefilled or other.namespace != request.namespace or not self._uses_tree(other):
                continue
            num_shared = num_common(own.token_ids[:-1], other.sequence.token_ids)
            whole_pages = num_shared - num_shared % self._pool.page_size
            is_worth_it = whole_pages > own.num_computed
            if (
                is_worth_it
                and self._tree.match(request.namespace, own.token_ids[:whole_pages]).num_tokens < whole_pages
            ):
                return True
        return False

    def _uses_tree(self, request: Request) -> bool:
        is_exact = request.sequence.fidelity is Fidelity.EXACT
        return self._may_read_cache(request) and is_exact and request.ready_logits is None

    def _may_read_cache(self, request: Request) -> bool:
        return self._config.cache and request.reads_cache

    def _take_pages(self, request: Request) -> None:
        """Share what the tree has of the prompt and allocate the rest, for all choices, or change nothing.

        What was found for a request is held for it, so it cannot be evicted; where that leaves too little room, and
        nothing runs that could return some, the request does without.
        """
        sequence = request.sequence
        self._plan(request)
        num_own, heals = request.num_own_pages(self._pool.page_size), request.policy.heal
        try:
            while True:
                try:
                    num_missing = sequence.num_missing_pages(request.max_tokens)
                    num_missing += num_own * (len(request.branches) - 1)
                    num_missing += self._healing.num_pages(request) if heals else 0
                    self._in_flight.make_room(num_missing)
                    break
                except PoolExhausted:
                    if self._in_flight.running or not self._do_without(request):
                        raise
        except PoolExhausted:
            self._in_flight.drop_attempt(request)
            if request.is_lent:
                sequence.trim()
            else:
                sequence.release()
            raise
        self._in_flight.drop_reading(request)  # first: a page that both hold would be copied
        sequence.make_writable(sequence.num_computed, request.max_tokens)
        if heals:
            self._healing.reserve(request)
        for branch in request.branches[1:]:
            # Until the prompt is computed and can be forked, a further choice holds just the pages it will need.
            branch.sequence = KVSequence(self._pool)
            branch.sequence.make_writable(0, num_own * self._pool.page_size)

    def _do_without(self, request: Request) -> bool:
        """Give up something that was found for a request and takes room; False if there is nothing like that."""
        sequence, page_size = request.sequence, self._pool.page_size
        if request.policy.heal and self._healing.do_without(request):
            return True
        if request.attempt is not None:
            self._in_flight.drop_attempt(request)
        elif not request.is_lent and request.ready_logits is None and sequence.num_computed % page_size:
            # A page of which only a part is shared is needed twice: for whoever has it, and for what is written behind.
            sequence.rewind(sequence.num_computed - sequence.num_computed % page_size)
            sequence.trim()
        else:
            return False
        request.plan = exact_plan(sequence.num_computed, sequence.num_tokens, Reason.NO_ROOM)
        request.pending = list(request.plan.stretches)
        return True

    def _plan(self, request: Request) -> None:
        """Share what the tree has of the prompt, and decide about the rest."""
        sequence = request.sequence
        if request.ready_logits is None:
            # The last token is always computed: its logits are not in the cache.
            sequence.rewind(min(sequence.num_computed, sequence.num_tokens - 1))
        num_before = sequence.num_computed
        reading = request.reading
        if reading is not None and request.ready_logits is None and request.reads_cache:
            self._read_along.share(request)
        reason = Reason.NEW if self._may_read_cache(request) else Reason.CACHE_OFF
        if self._uses_tree(request):
            reason = self._share_from_tree(request)
        if reading is not None:
            request.num_read = self._read_along.num_read(request, num_before)
        if request.may_move and request.ready_logits is None:
            request.plan, request.attempt = self._planner.plan(request, reason)
        elif request.ask is not None:
            request.plan = self._tiering.plan(request, reason)
        else:
            request.plan = exact_plan(sequence.num_computed, sequence.num_tokens, reason)
        if reading is not None:
            request.plan = self._read_along.told(reading, request.plan)
        request.pending = list(request.plan.stretches)

    def _share_from_tree(self, request: Request) -> Reason:
        sequence = request.sequence
        find = self._tree.look if request.is_trial else self._tree.match
        match = find(request.namespace, sequence.token_ids[:-1])
        if match.num_tokens > sequence.num_computed:
            sequence.adopt(match.pages, match.num_tokens)
        if sequence.num_computed >= sequence.num_tokens - 1:
            return Reason.LAST_TOKEN
        return Reason(match.reason.value) if match.reason is not None else Reason.NEW
