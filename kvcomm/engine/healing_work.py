"""Requests that heal while they are decoded: room for their twins, and what of these is computed next.

The answer of such a request begins on approximate KV. Its twin (`reuse.healing`) is computed beside answers, in rows
that cost them little; after so many tokens as its policy says it goes on with exact KV, neither sooner nor later, so
that an answer does not depend on how busy the engine is. What is missing of the twin by then is computed at once, and
only this request waits for it. An answer that ends sooner is out when it ends; its request ends when all is exact.
"""

from __future__ import annotations

from collections.abc import Callable

from kvcomm.engine.passes import Work
from kvcomm.engine.reading import Reading
from kvcomm.engine.request import Branch, Request
from kvcomm.engine.spare import MIN_CHUNK
from kvcomm.errors import QuotaExceeded
from kvcomm.memory.memory import Memory
from kvcomm.model.runner import Run
from kvcomm.reuse.healing import Healing, NotHealed


class HealingWork:
    """What the scheduler asks about healing; under its lock. Keeps nothing: a request's healing is the request's."""

    def __init__(self, memory: Memory, *, require_quota: Callable[[str, int], None]) -> None:
        """Make one.

        Args:
            require_quota: raises where a tenant's quota leaves no room for so many more pages.
        """
        self._memory = memory
        self._require_quota = require_quota
        self._page_size = memory.pool.page_size

    def num_pages(self, request: Request) -> int:
        """Pages that a twin of a request that is being admitted needs at most; 0: it gets none."""
        if not request.policy.heal or request.not_healed is not None or self._is_refused(request) is not None:
            return 0
        starts = [] if request.attempt is None else [request.attempt.moves[0].start]
        if request.sequence.approximate_from is not None:
            starts.append(request.sequence.approximate_from)
        return -(-_end(request) // self._page_size) - min(starts) // self._page_size if starts else 0

    def reserve(self, request: Request) -> None:
        """Hold the pages of a twin, for which there is room in the pool."""
        num_pages = self.num_pages(request)
        if not num_pages:
            return
        try:
            self._require_quota(request.owner, num_pages)
        except QuotaExceeded:
            request.not_healed = NotHealed.QUOTA
        else:
            request.healing = Healing(self._memory, request.namespace, request.sequence)
            request.healing.reserve(num_pages)

    def do_without(self, request: Request) -> bool:
        """Let a request that finds no room get no twin; False if it gets none anyway."""
        if not self.num_pages(request):
            return False
        request.not_healed = NotHealed.NO_ROOM
        return True

    def begin(self, request: Request) -> None:
        """The answer begins: keep the room for a twin if anything is approximate, or say why there is none.

        The twin is made when it is first computed: nothing of that delays the first token.
        """
        if not request.policy.heal or request.sequence.approximate_from is None:
            request.not_healed = None
            self.drop(request)
        elif request.healing is None:
            request.not_healed = self._is_refused(request) or request.not_healed
        else:
            request.healing.approximate_from = request.sequence.approximate_from

    def drop(self, request: Request) -> None:
        """A request needs no twin any more."""
        if request.healing is not None and not request.healing.is_in_place:
            request.healing.release()
            request.healing = None

    def num_guesses(self, request: Request, branch: Branch) -> int | None:
        """Guesses that a step may try before the twin takes over; None: as many as it likes."""
        if not request.is_healing:
            return None
        return request.policy.heal_within - len(branch.token_ids) - 1

    def has_caught_up(self, request: Request) -> bool:
        """Whether the twin of a request that waits for it can take over."""
        return request.awaits_twin and self._twin_of(request).has_caught_up

    def awaited_work(self, request: Request, budget: int) -> Work:
        """What comes next of a twin that is awaited, at most `budget` tokens, and with them its request's next token.

        Raises:
            PoolExhausted: a page was taken that had been reserved.
        """
        branch = request.branches[0]
        if branch.finish_reason is not None:
            return self._work(request, request.sequence.num_computed, budget, None)
        # What a grammar allows is looked at in a step of its own.
        draws = branch.grammar is None
        num_tokens = min(_end(request), request.sequence.num_tokens - (not draws))
        return self._work(request, num_tokens, budget, branch if draws else None)

    def wants_more(self, request: Request) -> bool:
        """Whether more of its twin would be computed beside answers."""
        return request.is_healing and not request.awaits_twin

    def spare_work(self, request: Request, budget: int) -> Work | None:
        """What is worth computing beside answers of a twin that is not awaited yet; None: nothing."""
        if not self.wants_more(request):
            return None
        # The last token is the answer's to compute: with it comes the next one.
        num_tokens = request.sequence.num_tokens - 1
        num_missing = num_tokens - self._twin_of(request).twin.num_computed
        if budget < min(MIN_CHUNK, num_missing) or not num_missing:
            return None
        return self._work(request, num_tokens, budget, None)._replace(is_beside=True)

    def _work(self, request: Request, num_tokens: int, budget: int, branch: Branch | None) -> Work:
        healing = self._twin_of(request)
        is_alike = healing.grow(num_tokens)
        assert is_alike, f"the twin of request {request.request_id} has other tokens"
        start, end = healing.stretch(num_tokens)
        twin, is_last = healing.twin, end <= start + budget
        end = min(end, start + budget)
        # Logits of its last token also tell whether what was computed are numbers.
        run = Run(twin.token_ids[start:end].copy(), twin.pages.copy(), start, int(is_last))
        return Work(request, branch if is_last and end == request.sequence.num_tokens else None, twin, (run,))

    def _twin_of(self, request: Request) -> Healing:
        """The healing of a request that has one, with a twin from now on."""
        healing = request.healing
        assert healing is not None
        if not healing.has_begun:
            healing.begin(_end(request))
        return healing

    def _is_refused(self, request: Request) -> NotHealed | None:
        """Why a request is never healed, whatever room there is."""
        if request.num_choices > 1:
            return NotHealed.SEVERAL_ANSWERS
        return NotHealed.NO_ANSWER if request.sampling.max_new_tokens == 0 else None


def is_of_twin(work: Work) -> bool:
    """Whether work is of a request's exact twin."""
    healing = None if isinstance(work.request, Reading) else work.request.healing
    return healing is not None and work.sequence is healing.twin


def _end(request: Request) -> int:
    """Tokens that a twin has when it takes over, at most."""
    return request.num_prompt_tokens + request.num_moved_tokens
