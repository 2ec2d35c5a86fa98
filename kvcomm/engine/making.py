"""How requests are made: what a caller wants, checked, with everything that the scheduler needs for it.

Whoever makes a request gives its pages back until it is submitted.
"""

from __future__ import annotations

import itertools
import secrets
from collections import deque
from collections.abc import Callable
from functools import partial

from kvcomm.config import EngineConfig
from kvcomm.engine.detokenize import Detokenizer
from kvcomm.engine.grammar_state import GrammarState
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.holdings import Holdings
from kvcomm.engine.language import Language
from kvcomm.engine.reading import Reading
from kvcomm.engine.request import Branch, Request
from kvcomm.engine.sampler import Sampler
from kvcomm.engine.sampling import SamplingParams
from kvcomm.engine.scheduler import Scheduler
from kvcomm.engine.tenancy import Tenancy
from kvcomm.memory.pool import PagePool
from kvcomm.memory.segments import Prompt, Segment, token_ids_of
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.live import LiveWeights, Weights
from kvcomm.reuse.policy import ReusePolicy, checked_policy
from kvcomm.reuse.reuse import Reuse


class RequestMaker:
    """Makes the requests of one engine. Safe to call from any thread."""

    def __init__(
        self,
        config: EngineConfig,
        pool: PagePool,
        live: LiveWeights,
        policy: ReusePolicy,
        scheduler: Scheduler,
        reuse: Reuse,
        *,
        tenancy: Tenancy,
        holdings: Holdings,
        language: Language,
        engine_id: int,
    ) -> None:
        """Make one.

        Args:
            policy: of requests that come with none.
            engine_id: by which handles know whose they are.
        """
        self._page_size = config.page_size
        self._pool = pool
        self._live = live
        self._policy = policy
        self._scheduler = scheduler
        self._reuse = reuse
        self._tenancy = tenancy
        self._holdings = holdings
        self._language = language
        self._engine_id = engine_id
        self._ids = itertools.count()

    @property
    def num_waiting(self) -> int:
        """Requests that wait to be admitted."""
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """Requests that are computed."""
        return self._scheduler.num_running

    def has_made(self, handle: RequestHandle) -> bool:
        """Whether a handle is of a request of this engine."""
        return handle.engine_id == self._engine_id

    def next_id(self) -> int:
        """An id that no request and no open prompt has had."""
        return next(self._ids)

    def handle(self, tenant: str, cancel: Callable[[], None]) -> RequestHandle:
        """The handle of a request of this tenant, which may be made later."""
        return RequestHandle(self.next_id(), cancel, tenant=tenant, engine_id=self._engine_id)

    def make_first(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        tenant: str,
        policy: ReusePolicy | None,
        adapter: str | None,
        reading: Reading | None = None,
    ) -> Request:
        """A request for an answer to a prompt behind which nothing stands yet; see `make`.

        Raises:
            UnknownAdapter, WeightsChanged, UnsupportedModel: see `LiveWeights.now`.
        """
        segments = self._language.reader.read(prompt, is_start=True)
        return self.make(
            KVSequence(self._pool, token_ids_of(segments)),
            segments,
            sampling,
            tenant=tenant,
            policy=policy,
            weights=self._live.now(adapter, closely=True),
            adapter=adapter,
            reading=reading,
        )

    def make(
        self,
        sequence: KVSequence,
        segments: tuple[Segment, ...],
        sampling: SamplingParams,
        *,
        tenant: str,
        policy: ReusePolicy | None,
        weights: Weights,
        adapter: str | None,
        is_lent: bool = False,
        reading: Reading | None = None,
    ) -> Request:
        """A request for an answer behind a sequence, whose tokens are those of the segments.

        Args:
            policy: None: the engine's.
            adapter: that the weights are of; None: the model as its user has left it.
            is_lent: the sequence is a context's.
            reading: the open prompt that the segments have been, with the handle that its user has.

        Raises:
            InvalidRequest: too long, unknown tokens among the biases, a grammar that cannot be enforced, a policy that
                names what this engine does not have.
            QuotaExceeded: the tenant's contexts and requests leave no room for it.
        """
        num_tokens = sum(len(segment.token_ids) for segment in segments)
        assert num_tokens == sequence.num_tokens, f"segments of {num_tokens} tokens, {sequence.num_tokens} in sequence"
        self._language.reader.require_fits(sequence.num_tokens, sampling.max_new_tokens)
        self._language.reader.require_known(token_id for token_id, _ in sampling.biases)
        is_scored = sampling.prompt_logprobs is not None
        if is_scored:
            wanted = ReusePolicy.exact()
        else:
            wanted = self._policy if policy is None else checked_policy(policy)
        namespace = self._tenancy.namespace(weights, tenant)
        if not wanted.is_exact:
            self._reuse.require_known(wanted.rungs)
            self._reuse.used(namespace, weights, tenant)
        handle = None if reading is None else reading.handle
        if handle is None:
            handle = self.handle(tenant, lambda: self._scheduler.cancel(request))
        request = Request(  # named, for the handle's cancel above
            request_id=handle.request_id,
            namespace=namespace,
            tenant=tenant,
            owner=self._tenancy.home(tenant),
            weights=weights,
            adapter=adapter,
            sampling=sampling,
            sequence=sequence,
            handle=handle,
            branches=self._branches(sequence, sampling, tenant),
            segments=segments,
            policy=wanted,
            is_lent=is_lent,
            reads_cache=not is_scored,
            reading=reading,
        )
        if self._holdings.quota_pages:
            self._require_quota(request)
        if reading is not None:
            handle.cancelled_by(lambda: self._scheduler.cancel(request))
        return request

    def _branches(self, sequence: KVSequence, sampling: SamplingParams, tenant: str) -> list[Branch]:
        """The choices of a request, each where it stands before its first token."""
        entropy = secrets.randbits(62)
        language = self._language
        texts = language.texts.plain if sampling.skip_special_tokens else language.texts.shown
        branches = []
        for index in range(sampling.n):
            grammar = self._beginning(sampling, tenant)
            sampler = partial(Sampler, sampling, index, entropy=entropy, grammar=grammar, end_token_ids=language.ends)
            detokenizer = partial(
                Detokenizer,
                language.tokenizer,
                sampling.stop,
                texts=texts,
                encode=language.encoder.plain,
                min_tokens=sampling.min_tokens,
            )
            forced = deque(() if grammar is None else grammar.take_forced())
            branches.append(Branch(index, sequence, sampler, detokenizer, grammar, forced))
        return branches

    def _beginning(self, sampling: SamplingParams, tenant: str) -> GrammarState | None:
        return None if sampling.grammar is None else self._language.grammars.compile(sampling.grammar, owner=tenant)

    def _require_quota(self, request: Request) -> None:
        sequence = request.sequence
        with self._scheduler.lock:
            num_read = self._scheduler.read_along.num_usable(request) // self._page_size
            num_held = sequence.num_pages + max(0, num_read - sequence.num_pages)
            num_wanted = request.num_pages(self._page_size)
            self._holdings.require_quota(request.owner, num_wanted, num_held=num_held)
