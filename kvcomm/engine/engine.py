"""The engine: one model, its pool and tree, and the requests and contexts on them.

It puts the parts together and is the only one to hand them out: it reads prompts, makes requests, knows the living
contexts, and proves that nothing leaked (`check_integrity`). What happens inside a step is the scheduler's matter.
"""

from __future__ import annotations

import itertools
import secrets
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, overload

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvcomm import values
from kvcomm.align.calibration import Pair
from kvcomm.align.ladder import Rung
from kvcomm.align.levels import Standing
from kvcomm.align.prior import Prior, find_prior, require_prior_fits
from kvcomm.align.profile_file import Profile
from kvcomm.align.readers import Reader, reader_of
from kvcomm.config import EngineConfig
from kvcomm.engine.adapters import Adapters
from kvcomm.engine.chat import ChatPrompts, Messages
from kvcomm.engine.context import Context, sampling_params
from kvcomm.engine.detokenize import Detokenizer
from kvcomm.engine.encoding import TextEncoder
from kvcomm.engine.exchange import KVExchange, layer_shapes
from kvcomm.engine.grammar import Grammar
from kvcomm.engine.grammar_compiler import GrammarCompiler
from kvcomm.engine.grammar_state import GrammarState
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.holdings import Holdings, num_distinct
from kvcomm.engine.loop import EngineLoop
from kvcomm.engine.open_prompt import DEADLINE_S, OpenPrompt, Reading, require_open
from kvcomm.engine.prompts import Prompt, PromptReader
from kvcomm.engine.request import Branch, Request
from kvcomm.engine.results import Completion
from kvcomm.engine.sampler import Sampler
from kvcomm.engine.sampling import SamplingParams
from kvcomm.engine.scheduler import Scheduler
from kvcomm.engine.shared_learning import SharedLearning
from kvcomm.engine.tiering import Tiering, tier_space
from kvcomm.engine.token_texts import TokenTexts
from kvcomm.engine.warming import Gained, Progress, require_movable, warm
from kvcomm.errors import InvalidRequest, UnknownAdapter, WeightsChanged
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.lock_rule import holding
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PagePool
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import Sequence
from kvcomm.model.adapters import without_wrapper
from kvcomm.model.attention import make_backend
from kvcomm.model.geometry import ModelGeometry
from kvcomm.model.live import LiveWeights, Weights
from kvcomm.model.loading import load_model
from kvcomm.model.namespace import model_identity
from kvcomm.model.runner import ModelRunner
from kvcomm.plain import MAX_TEXT
from kvcomm.reuse.budget import KNOWN_LOAN_S, LOAN_S, Budget
from kvcomm.reuse.lesson import Lesson
from kvcomm.reuse.parts import ReuseParts
from kvcomm.reuse.plan import Explanation
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.replay import Outcome
from kvcomm.reuse.status import ReaderStatus, status_of
from kvcomm.starting import collector_paused
from kvcomm.tiers.tier import Tier, TierSpace

DEFAULT_TENANT = "default"


class MemoryStats(NamedTuple):
    """Pages of the pool: free ones, and those the tree, contexts and requests refer to (one page may be in several)."""

    num_pages: int
    num_free: int
    num_cached: int
    num_in_contexts: int
    num_in_requests: int
    page_bytes: int
    bytes_copied: int


class Engine:
    """Exact KV reuse, forks and continuous batching over a Hugging Face decoder.

    The model is used as it is and stays usable by itself. Thread-safe; usable in a `with` statement, which closes it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        config: EngineConfig | None = None,
        policy: ReusePolicy | None = None,
        weights_id: str | None = None,
        prior: Prior | Literal["shipped"] | None = "shipped",
        tier: Tier | str | None = None,
    ) -> None:
        """Make an engine for a model, with a pool and a cache of its own.

        Args:
            model: a decoder on its device, in its dtype; it is put into eval mode. Adapters that PEFT has put into its
                layers may be named by requests, also where the model is wrapped in a `PeftModel`.
            weights_id: identity of the weights without adapters where it is known already; else they are hashed (about
                0.2 s per GB).
            prior: pairs measured on this model beforehand, so that approximate reuse may begin at once; by default
                those that come with kvcomm, if there are any for it.
            tier: where exact prefixes are shared with other engines, or its URL, see `Tier.open`; the engine closes
                what it has opened. What is wrong with it later costs time, never an answer.

        Raises:
            UnsupportedModel: its KV cannot be cached soundly.
            InvalidRequest: the attention back end asked for does not run here, or the prior is none.
            AnchorFileForeign: the prior is of another model.
            TierError: there can be no tier at that URL.
        """
        self.config = config or EngineConfig()
        self.policy = _policy(policy) or ReusePolicy.exact()
        given, model = model, without_wrapper(model)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.geometry = ModelGeometry.from_model(model)
        self.backend = make_backend(self.config.attention, model.device, self.geometry.layers)
        self.live = LiveWeights(model, weights_id)
        self._adapters = Adapters(given, model, self.live, self._model_identity)
        self._lock = RLock()
        self.memory = self._make_memory()
        self.pool, self.tree = self.memory.pool, self.memory.tree
        self.runner = runner = ModelRunner(
            model,
            keys=self.pool.keys,
            values=self.pool.values,
            page_size=self.config.page_size,
            backend=self.backend,
            live=self.live,
        )
        ends = end_token_ids(model, tokenizer)
        identity = self._adapters.home(DEFAULT_TENANT)
        self._first_weights = self.live.now()
        first = self._first_weights.digest
        self.prior_model = self._model_identity(first, {})
        known = _prior(prior, self.prior_model)
        self._prior_weights = None if known is None else first
        self.reuse = ReuseParts.make(self.config, self.memory, self.geometry, runner, self._lock, identity, ends, known)
        self._holdings = Holdings(self.pool, lambda: scheduler.requests(), lambda: scheduler.read_along)
        own_tier = Tier.open(tier) if isinstance(tier, str) else None
        self._tiering = Tiering(
            own_tier or _tier(tier),
            self.memory,
            self.reuse.cost,
            self._lock,
            space_of=partial(tier_space, self._adapters, self.geometry),
        )
        self.reuse.when_published(self._tiering.published)
        self._shared_learning = SharedLearning(self.reuse, self._tiering.tier)
        scheduler = self.scheduler = Scheduler(
            self.config,
            self.memory,
            runner,
            self.reuse.planner,
            self.reuse.learner,
            self.reuse.idle,
            self._lock,
            adapters=self._adapters,
            tiering=self._tiering,
            reclaim=self._holdings.reclaim,
            require_quota=partial(self._holdings.require_quota, num_held=0),
        )
        self.encoder = TextEncoder(tokenizer)
        self._texts = TokenTexts(tokenizer)
        self._shown_texts = TokenTexts(tokenizer, skip_special_tokens=False)
        self._reader = PromptReader(
            self.encoder, vocab_size=self.geometry.vocab_size, max_context=self.geometry.max_context
        )
        self._grammars = GrammarCompiler(
            tokenizer, self._texts, vocab_size=self.geometry.vocab_size, end_token_ids=ends
        )
        self._ends = ends
        self._chats = ChatPrompts(tokenizer, self.encoder, self._reader, self._texts)
        self._cached_pages: dict[str, int] = {}
        self._request_ids = itertools.count()
        self._budget = Budget(self.config.learning_share, LOAN_S if known is None else KNOWN_LOAN_S)
        self._loop = EngineLoop(self.scheduler, self.reuse.idle, self._budget, self.config.idle_after_s)
        self._exchange = KVExchange(self.memory, self.geometry, self._holdings, self.lock, self._loop.require_open)
        self._finalizer = weakref.finalize(self, _close, self._loop, self._tiering, self._shared_learning, own_tier)

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        weights: str | None = None,
        config: EngineConfig | None = None,
        policy: ReusePolicy | None = None,
        prior: Prior | Literal["shipped"] | None = "shipped",
        tier: Tier | str | None = None,
        progress: bool = False,
    ) -> Engine:
        """Load a packaged model ("smollm2-135m"), a folder, a GGUF file or a hub id.

        Args:
            weights: "int8" or "int4" keeps weights in fewer bits; see `load_model` for this and the other arguments.

        Raises:
            InvalidRequest: kept weights, a dtype or a device that cannot be used here.
            ModelLoadError: unknown, not fetchable, wrong hash, damaged folder; one clear line each.
            UnsupportedModel: its KV cannot be cached soundly.
        """
        with collector_paused():
            loaded = load_model(name, dtype=dtype, device=device, weights=weights, progress=progress)
            return cls(
                loaded.model,
                loaded.tokenizer,
                config=config,
                policy=policy,
                weights_id=loaded.weights_digest,
                prior=prior,
                tier=tier,
            )

    def __repr__(self) -> str:
        # Without the lock: whoever looks at an engine waits for nobody, and the numbers are about those of now.
        name = Path(str(self.model.config.name_or_path)).name or type(self.model).__name__
        pages = f"{self.pool.num_pages} pages of {self.config.page_size}"
        in_flight = self.scheduler.num_waiting + self.scheduler.num_running
        held = f"{self._holdings.num_contexts} contexts, {in_flight} requests"
        state = "closed" if self.scheduler.is_closed else "running"
        dtype = str(self.model.dtype).removeprefix("torch.")
        where = f"{name[:MAX_TEXT]}, {dtype}, {self.model.device}"
        return f"Engine({where}, {pages}, {held}, {state})"

    @property
    def lock(self) -> RLock:
        """Guards all state; held while state changes, not during a forward pass."""
        return self._lock

    @property
    def max_context(self) -> int:
        """Tokens the model may see at most, prompt and answer."""
        return self.geometry.max_context

    @property
    def contexts(self) -> tuple[Context, ...]:
        """Contexts that have not been released."""
        with self.lock:
            return self._holdings.contexts

    def namespace(self, tenant: str = DEFAULT_TENANT, *, adapter: str | None = None) -> str:
        """Digest under which a tenant's KV is cached now; differs with model, weights, adapter, dtype, rope, tokenizer
        and tenant.

        Args:
            adapter: None: as the model's user has left it.

        Raises:
            InvalidRequest: the tenant is no text.
            UnknownAdapter: there is none of that name.
            WeightsChanged, UnsupportedModel: nothing can be computed with what the model has become.
        """
        return self._namespace(self._adapters.weights(adapter), tenant)

    def namespaces(self, tenant: str = DEFAULT_TENANT) -> tuple[str, ...]:
        """A tenant's namespaces with every adapter, the one with none named first; as of when somebody last looked."""
        return self._adapters.namespaces(tenant)

    def home(self, tenant: str = DEFAULT_TENANT) -> str:
        """What a tenant's named segments and quotas go by, whatever the weights are: its first namespace."""
        return self._adapters.home(tenant)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Adapters that requests, contexts and agents may name, sorted."""
        return self._adapters.names

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Attach an adapter that PEFT has saved; requests may name it from then on. What is active stays so.

        Its KV is cached under the digest of its weights and settings: the same in every process, whatever its name.

        Raises:
            InvalidRequest: the name cannot be used, or is taken.
            ModelLoadError: no adapter, or none that fits the model; nothing is attached.
            MissingExtra: PEFT is not installed.
        """
        self._adapters.load(name, Path(folder))

    def unload_adapter(self, name: str) -> None:
        """Take an adapter out of the model. Requests that use it fail, contexts wait for it to come back.

        Raises:
            UnknownAdapter: there is none of that name.
        """
        self._adapters.unload(name)

    def weights_changed(self) -> None:
        """Tell the engine that the model computes something else now, where it cannot see that by itself.

        It sees what `kvcomm.model.live` lists, which is nearly all; not hooks, methods and plain attributes, or single
        numbers written past torch. What is cached so far will not be found again, nor can snapshots be restored that
        were made before, or elsewhere.
        """
        self.live.forget()

    def _namespace(self, weights: Weights, tenant: str) -> str:
        namespace = self._adapters.namespace(weights, tenant)
        if weights.digest == self._prior_weights:
            with self.lock:
                self.reuse.book.admit_prior(namespace)
        if tenant in self._cached_pages:
            with self.lock:  # each adapter's namespace begins without a quota
                self._limit(namespace, self._cached_pages.get(tenant))
        return namespace

    def _limit(self, namespace: str, num_pages: int | None) -> None:
        if self.tree.usage(namespace).quota_pages != num_pages:
            self.tree.set_quota(namespace, num_pages)
            num_bytes = None if num_pages is None else num_pages * self.pool.page_bytes
            self.memory.renditions.set_budget(namespace, num_bytes)

    def segment(self, text: str, *, name: str | None = None) -> Segment:
        """A text tokenized on its own, as a piece of a prompt, to be used in prompts as often as you like.

        Its ids are the same wherever it stands: a space that the tokenizer puts before texts is left out. Control
        tokens in it are real.
        """
        return self._reader.segment(text, name=name)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of token ids, special tokens included."""
        return self._texts.decode(list(token_ids), skip_special_tokens=False)

    def locate(self, token_ids: Iterable[int]) -> tuple[str, tuple[int, ...]]:
        """Text of token ids, special tokens included, and where in it the text of each begins; see `Choice`."""
        detokenizer = Detokenizer(self.tokenizer, texts=self._shown_texts)
        for token_id in token_ids:
            detokenizer.push(token_id)
        detokenizer.finish()
        return detokenizer.text, detokenizer.starts(0, detokenizer.num_placed)

    def lost_space(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The space that the text of an answer lacks at its start and has behind a prompt, or nothing.

        Args:
            token_ids: of the answer; those with its first text will do.
            skip_special_tokens: as in the request.
        """
        texts = self._texts if skip_special_tokens else self._shown_texts
        first = next(([token_id] for token_id in token_ids if not texts.is_silent(token_id)), [])
        return " " if first and texts.behind(first) == " " + texts.decode(first) else ""

    def token_text(self, token_id: int) -> str:
        """Text of one token behind others, with the space that the start of a text may lose."""
        return self._texts.behind([token_id])

    def token_bytes(self, token_id: int) -> bytes:
        """The same in UTF-8; also of a token that is a part of a character only."""
        return self._texts.bytes_of(token_id)

    def context(
        self,
        prompt: Prompt,
        *,
        adapter: str | None = None,
        tenant: str = DEFAULT_TENANT,
        name: str | None = None,
        policy: ReusePolicy | None = None,
    ) -> Context:
        """A context that holds the prompt, computed once (or taken from the cache).

        Args:
            adapter: that computes the context and all that is done with it; None: the model as its user has left it.
                While its weights are others than those that computed it, it cannot be gone on with (WeightsChanged).
            policy: how far reuse may depart from exact results, here and in what is done with the context; None: the
                engine's.

        Raises:
            InvalidRequest: empty, too long, unknown tokens.
            PoolExhausted: no pages for it.
        """
        context = self.empty_context(adapter=adapter, tenant=tenant, name=name, policy=policy)
        try:
            return context.extend(prompt)
        except BaseException:
            context.release()
            raise

    def empty_context(
        self,
        *,
        adapter: str | None = None,
        tenant: str = DEFAULT_TENANT,
        name: str | None = None,
        policy: ReusePolicy | None = None,
    ) -> Context:
        """A context without a token, to be extended; see `context`."""
        weights = self._adapters.weights(adapter)
        return Context(
            self, Sequence(self.pool), tenant=tenant, weights=weights, adapter=adapter, name=name, policy=policy
        )

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        tenant: str = DEFAULT_TENANT,
        policy: ReusePolicy | None = None,
        rung: Rung | None = None,
        lesson: Lesson | None = None,
        reads_cache: bool = True,
        **settings: object,
    ) -> RequestHandle:
        """Start a request; wait for it, stream it or cancel it through the handle.

        Args:
            sampling: how to draw; or its fields by name. `json_schema` beside either of them is short for
                `grammar=Grammar.json_schema(...)`.
            adapter: that computes it, see `load_adapter`; None: the model as its user has left it at this moment.
            policy: how far reuse may depart from the exact answer; None: the engine's. Only segments with a name are
                ever moved.
            rung: for comparisons: reuse at exactly this rung, with no bound, instead of as the policy allows.
            lesson: serve exactly, and learn all of this from it in idle time; see `warm`.
            reads_cache: False: compute the whole prompt, whatever is cached; what was computed is cached all the same.

        Raises:
            InvalidRequest: empty, too long, unknown tokens, bad sampling settings, unknown adapter.
            WeightsChanged: nothing can be computed with what the model has become.
            PoolTooSmall: it would not even fit an empty pool.
            EngineClosed: the engine has been closed.
        """
        segments = self.read_prompt(prompt, is_start=True)
        sequence = Sequence(self.pool, _token_ids(segments))
        weights = self._adapters.weights(adapter)
        request = self._request(sequence, segments, sampling_params(sampling, settings), tenant, policy, weights)
        request.adapter = adapter
        if rung is not None:
            if request.sampling.prompt_logprobs is not None:
                raise InvalidRequest("prompt_logprobs are those of a prompt that is computed, so there can be no rung")
            self.reuse.planner.require_known([rung])
        request.rung = rung
        if lesson is not None:
            request.policy, request.lesson = ReusePolicy.exact(), lesson
        request.reads_cache = request.reads_cache and reads_cache
        self._loop.submit(request)
        return request.handle

    def open_prompt(
        self,
        prompt: Prompt | None = None,
        *,
        adapter: str | None = None,
        tenant: str = DEFAULT_TENANT,
        policy: ReusePolicy | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> OpenPrompt:
        """A prompt that is not complete yet: what is known of it is computed while others decode, and exactly.

        Text is put behind it as it becomes known, answers of requests in flight while they are written
        (`OpenPrompt.follow`); closing it starts the answer, whose prompt is then computed but for its last tokens.

        Args:
            prompt: what is known already.
            adapter: as in `submit`.
            policy: as in `submit`.
            deadline_s: seconds after which it is given up if it is not complete by then.

        Raises:
            InvalidRequest: empty, too long, unknown tokens, unknown adapter, a deadline that is no positive number.
            WeightsChanged: nothing can be computed with what the model has become.
            EngineClosed: the engine has been closed.
        """
        wanted = _policy(policy)
        weights = self._adapters.weights(adapter)

        def begin(reading: Reading, segments: tuple[Segment, ...]) -> None:
            assert reading.sampling is not None
            whole = self.read_prompt(segments, is_start=True)
            sequence = Sequence(self.pool, _token_ids(whole))
            now = self._adapters.weights(adapter)
            request = self._request(sequence, whole, reading.sampling, tenant, wanted, now, reading=reading)
            request.adapter = adapter
            self.scheduler.submit(request)  # the loop is woken, if it is not the one that asks, once this has succeeded

        opened = self._open(Sequence(self.pool), weights, tenant, deadline_s, begin)
        try:
            return opened if prompt is None else opened.append(prompt)
        except BaseException:
            opened.cancel()
            raise

    def open_behind(self, context: Context, deadline_s: float) -> OpenPrompt:
        """See `Context.follow`."""
        weights = self._weights_of(context)
        return self._open(context.sequence, weights, context.tenant, deadline_s, context.begin)

    def _open(
        self,
        past: Sequence,
        weights: Weights,
        tenant: str,
        deadline_s: float,
        begin: Callable[[Reading, tuple[Segment, ...]], None],
    ) -> OpenPrompt:
        """An open prompt behind what is there already."""
        seconds = values.real_number("deadline_s", deadline_s)
        if not seconds > 0:
            raise InvalidRequest(f"deadline_s must be a positive number of seconds, not {seconds}")
        namespace, owner = self._namespace(weights, tenant), self.home(tenant)
        with self.lock:
            self._loop.require_open()
            reading = Reading(
                request_id=next(self._request_ids),
                namespace=namespace,
                tenant=tenant,
                owner=owner,
                weights=weights,
                sequence=past.fork(),  # the last thing that may fail: from here on somebody gives its pages back
                due_s=time.monotonic() + seconds,
                max_tokens=self.geometry.max_context,
                begin=begin,
            )
            self.scheduler.read_along.add(reading)
        self._loop.wake()
        return OpenPrompt(self, reading)

    def change_open(self, reading: Reading, change: Callable[[], None]) -> None:
        """Change an open prompt, under the lock, and have the change looked at."""
        with self.lock:
            try:
                change()
            finally:
                self.scheduler.read_along.touch()
        self._loop.wake()

    def cancel_open(self, reading: Reading) -> None:
        """See `OpenPrompt.cancel`."""
        with self.lock:
            self.scheduler.read_along.cancel(reading)
        self._loop.wake()

    def require_followable(self, reading: Reading, source: RequestHandle) -> None:
        """Raises InvalidRequest where an open prompt cannot follow a request: nobody learns of others' requests."""
        if source.engine_id != id(self):
            raise InvalidRequest(f"request {source.request_id} is none of this engine's: follow where it is computed")
        if source.tenant != reading.tenant:
            raise InvalidRequest(f"there is no request {source.request_id} to follow")

    def open_of(self, handle: RequestHandle) -> Reading | None:
        """The closed prompt that still waits for what it follows and will become this request. Under the lock."""
        readings = self.scheduler.read_along.readings
        return next((each for each in readings if each.handle is handle and not each.is_begun), None)

    def close_open(
        self, reading: Reading, sampling: SamplingParams | None, settings: dict[str, object], prompt: Prompt | None
    ) -> RequestHandle:
        """See `OpenPrompt.close`."""
        params = sampling_params(sampling, settings)
        if params.grammar is not None:
            self.compile_grammar(params.grammar, tenant=reading.tenant)  # not under the lock
        is_start = not reading.num_before
        whole = None if prompt is None else self.read_prompt(prompt, is_start=is_start)
        with self.lock:
            require_open(reading)
            if whole is None and not reading.parts and is_start:
                raise InvalidRequest("the open prompt holds nothing; append a text, or follow an answer")
            reading.sampling, reading.prompt = params, whole
            reading.handle = handle = self._handle(reading.tenant, partial(self.cancel_open, reading))
            self.scheduler.read_along.begin_now(reading)
        self._loop.wake()
        return handle

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        tenant: str = DEFAULT_TENANT,
        policy: ReusePolicy | None = None,
        rung: Rung | None = None,
        reads_cache: bool = True,
        **settings: object,
    ) -> Completion:
        """`submit` and wait for the result; raises what `submit` and `RequestHandle.result` raise."""
        handle = self.submit(
            prompt,
            sampling,
            adapter=adapter,
            tenant=tenant,
            policy=policy,
            rung=rung,
            lesson=None,
            reads_cache=reads_cache,
            **settings,
        )
        return handle.result()

    def chat(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        tools: Iterable[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        adapter: str | None = None,
        tenant: str = DEFAULT_TENANT,
        policy: ReusePolicy | None = None,
        reads_cache: bool = True,
        **settings: object,
    ) -> Completion:
        """`generate` of `chat_prompt`; raises what those raise. To stream, submit the prompt."""
        prompt = self.chat_prompt(messages, tools=tools, variables=variables)
        params = sampling_params(sampling, settings)
        return self.generate(prompt, params, adapter=adapter, tenant=tenant, policy=policy, reads_cache=reads_cache)

    def chat_prompt(
        self,
        messages: Messages,
        *,
        tools: Iterable[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> tuple[Segment, ...]:
        """The prompt of a conversation, as the model's chat template writes it: for `submit`, `context`, `learn` etc.

        The content of a message is one part, or a list of parts; these are joined with nothing in between.

        - A `Segment` is a passage: the same ids wherever it stands, so its KV can be moved. Passages of one name are
          of one kind; one without a name is a "passage".
        - {"type": "text", "text": ...} with a "name", or with "dynamic": True, is a passage as well.
        - `Static(text)`, and in system messages every other text, is a part of the template. What is known about moving
          text belongs to a template, so nothing that differs from request to request should be there.
        - Every other text is the turn's own, a segment named "text". Only this may be trimmed by the chat template.

        Control tokens spelled out in messages are ordinary text.

        Args:
            messages: dicts with "role", "content", and what else the chat template looks at.
            tools: JSON schemas of functions, for the chat template; refused where it has no place for them.
            variables: what else it may look at, such as {"enable_thinking": False}.
            add_generation_prompt: put the beginning of an answer behind them.

        Raises:
            TemplateError: there is no chat template, or it rejects, drops, repeats, moves or changes something of these
                messages; names the message and the part.
            InvalidRequest: messages or parts that are none, or a segment with a control token in it; names them.
        """
        segments = self._chats.segments(
            messages, tools=tools, variables=variables, add_generation_prompt=add_generation_prompt
        )
        return self.read_prompt(segments, is_start=True)

    def compile_grammar(self, grammar: Grammar, *, tenant: str = DEFAULT_TENANT) -> None:
        """Make a grammar ready for a tenant's requests, which then need no time for it; the most recent ones are kept.

        Raises:
            InvalidRequest: it cannot be enforced, costs too much, or nothing satisfies it; names what is at fault.
        """
        self._grammars.compile(grammar, owner=tenant)

    def prepare_grammars(self) -> None:
        """Look at all tokens as grammars see them: a second or two, which else the first grammar waits for.

        Safe to call from any thread, beside requests. Nothing where the answers of this model cannot be constrained.
        """
        self._grammars.prepare()

    def explain(
        self,
        prompt: Prompt,
        *,
        adapter: str | None = None,
        tenant: str = DEFAULT_TENANT,
        policy: ReusePolicy | None = None,
    ) -> Explanation:
        """The plan of a request that is not made: what would come from the cache, what not, why, and what it takes.

        Counts as no use of the cache, and asks no tier. Where nothing happens in between, a request gets this plan.

        Raises:
            InvalidRequest: empty, too long, unknown tokens.
            QuotaExceeded: the tenant could not make the request now.
        """
        segments = self.read_prompt(prompt, is_start=True)
        sequence = Sequence(self.pool, _token_ids(segments))
        weights = self._adapters.weights(adapter)
        request = self._request(sequence, segments, SamplingParams(max_new_tokens=0), tenant, policy, weights)
        request.is_trial = True
        explained = self.scheduler.explain(request)
        if explained.cold_s is None:
            self.reuse.measure_when_idle()
            self._loop.wake()
        return explained

    def _request(
        self,
        sequence: Sequence,
        segments: tuple[Segment, ...],
        sampling: SamplingParams,
        tenant: str,
        policy: ReusePolicy | None,
        weights: Weights,
        *,
        lent_by: Context | None = None,
        reading: Reading | None = None,
    ) -> Request:
        num_tokens = sum(len(segment.token_ids) for segment in segments)
        assert num_tokens == sequence.num_tokens, f"segments of {num_tokens} tokens, {sequence.num_tokens} in sequence"
        self._reader.require_fits(sequence.num_tokens, sampling.max_new_tokens)
        self._reader.require_known(token_id for token_id, _ in sampling.biases)
        is_scored = sampling.prompt_logprobs is not None
        wanted = ReusePolicy.exact() if is_scored else _policy(policy) or self.policy
        if not wanted.is_exact:
            self.reuse.planner.require_known(wanted.rungs)
            self._shared_learning.used(self._namespace(weights, tenant), self._tiering.space_of(weights, tenant))
        handle = None if reading is None else reading.handle
        if handle is None:
            handle = self._handle(tenant, lambda: self.scheduler.cancel(request))
        entropy = secrets.randbits(62)
        texts = self._texts if sampling.skip_special_tokens else self._shown_texts
        branches = []
        for index, grammar in enumerate(self._beginnings(sampling, tenant)):
            sampler = Sampler(sampling, index, entropy=entropy, grammar=grammar, end_token_ids=self._ends)
            detokenizer = Detokenizer(
                self.tokenizer,
                sampling.stop,
                texts=texts,
                encode=self.encoder.plain,
                min_tokens=sampling.min_tokens,
            )
            branches.append(Branch(index, sequence, sampler, detokenizer, grammar))
        request = Request(  # named, for the handle's cancel above
            request_id=handle.request_id,
            namespace=self._namespace(weights, tenant),
            tenant=tenant,
            owner=self.home(tenant),
            weights=weights,
            sampling=sampling,
            sequence=sequence,
            handle=handle,
            branches=branches,
            segments=segments,
            policy=wanted,
            is_lent=lent_by is not None,
            reads_cache=not is_scored,
            reading=reading,
        )
        with self.lock:
            num_wanted = request.num_pages(self.config.page_size)
            num_read = self.scheduler.read_along.num_usable(request) // self.config.page_size
            num_held = sequence.num_pages + max(0, num_read - sequence.num_pages)
            self._holdings.require_quota(self.home(tenant), num_wanted, num_held=num_held)
        if reading is not None:
            handle.cancelled_by(lambda: self.scheduler.cancel(request))
        return request

    def _handle(self, tenant: str, cancel: Callable[[], None]) -> RequestHandle:
        return RequestHandle(next(self._request_ids), cancel, tenant=tenant, engine_id=id(self))

    def _beginnings(self, sampling: SamplingParams, tenant: str) -> list[GrammarState | None]:
        """Where each choice stands in its grammar before its first token."""
        if sampling.grammar is None:
            return [None] * sampling.n
        return [self._grammars.compile(sampling.grammar, owner=tenant) for _ in range(sampling.n)]

    def read_prompt(self, prompt: Prompt, *, is_start: bool) -> tuple[Segment, ...]:
        """The checked segments of a prompt; see `PromptReader.read`."""
        return self._reader.read(prompt, is_start=is_start)

    def submit_lent(
        self,
        context: Context,
        sequence: Sequence,
        segments: tuple[Segment, ...],
        sampling: SamplingParams,
        reading: Reading | None = None,
    ) -> RequestHandle:
        """Append segments to a context's sequence and run a request on it, under the lock.

        Args:
            reading: the open prompt that the segments have been.
        """
        num_kept = sequence.num_tokens
        weights = self._weights_of(context)
        new_tokens = _token_ids(segments)
        if not num_kept and not new_tokens:
            raise InvalidRequest("the context is empty; extend it before generating")
        if num_kept and sampling.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs are not there behind a context: what it holds is not computed again")
        is_fork = sampling.n > 1  # several answers cannot all stand behind the context: it stays as it is
        target = sequence.fork() if is_fork else sequence
        target.append(new_tokens)
        try:
            whole = (*context.segments, *segments)
            lent_by = None if is_fork else context
            request = self._request(
                target, whole, sampling, context.tenant, context.policy, weights, lent_by=lent_by, reading=reading
            )
            request.adapter = context.adapter
            request.num_kept_tokens = num_kept
            request.carried = context.carried
            if not new_tokens:
                request.ready_logits = context.ready_logits
            if not is_fork:
                request.on_success = lambda: self._complete(context, request, segments)
                request.on_healed = context.repaired
            if reading is None:
                self._loop.submit(request)
            else:
                self.scheduler.submit(request)
        except BaseException:
            if is_fork:
                target.release()
            else:
                target.truncate(num_kept)
            raise
        return request.handle

    def _weights_of(self, context: Context) -> Weights:
        """The weights to go on with in a context.

        Raises:
            WeightsChanged: they are not those that computed it.
        """
        named = "the model as it is now" if context.adapter is None else f"adapter {context.adapter!r}"
        try:
            weights = self._adapters.weights(context.adapter)
        except UnknownAdapter as error:
            raise WeightsChanged(f"{named} of context {context.name or ''} is gone; load it again to go on") from error
        if not context.num_tokens:
            context.weights = weights
        if weights.digest != context.weights.digest:
            raise WeightsChanged(
                f"context {context.name or ''} was computed by other weights than those of {named}; bring those back, "
                "or make the context anew"
            )
        return weights

    def _complete(self, context: Context, request: Request, segments: tuple[Segment, ...]) -> None:
        context.complete(request, segments)
        context.weights = request.weights

    def add_context(self, context: Context) -> None:
        """A context has been made."""
        with self.lock:
            self._holdings.add(context, self.home(context.tenant))

    def drop_context(self, context: Context) -> None:
        """A context has been released; what it computed stays in the cache until its pages are needed."""
        with self.lock:
            self._holdings.drop(context)

    def save_snapshot(self, context: Context, file: str | Path, *, replace: bool = True) -> Path:
        """Write a context's state; see `Context.save`."""
        file = Path(file)
        namespace = self._namespace(context.weights, context.tenant)
        self._exchange.save(context, file, namespace, is_new=not replace)
        return file

    def repair(self, context: Context) -> Future[bool]:
        """See `Context.repair`."""
        weights = self._weights_of(context)
        future = self.reuse.repairer.repair(self._namespace(weights, context.tenant), weights, context)
        self._loop.wake()
        return future

    def restore(self, file: str | Path, *, adapter: str | None = None, tenant: str = DEFAULT_TENANT) -> Context:
        """A context from a snapshot.

        Args:
            adapter: that computed it, whatever its name was then; see `context`.

        Raises:
            SnapshotError: unreadable, altered, too new, or of another model, adapter or tenant; see the subclasses.
            PoolExhausted: no pages for it.
            EngineClosed: the engine has been closed, before or meanwhile.
        """
        weights = self._adapters.weights(adapter)
        loaded = self._exchange.load(Path(file), self._namespace(weights, tenant))

        def finish(sequence: Sequence) -> Context:
            return Context(
                self,
                sequence,
                tenant=tenant,
                weights=weights,
                adapter=adapter,
                name=loaded.name,
                segments=loaded.segments,
                last_logits=loaded.last_logits,
                note=loaded.note,
            )

        owner = self.home(tenant)
        return self._exchange.place(owner, loaded.token_ids, loaded.keys, loaded.values, loaded.fidelity, finish)

    def copy_to_hf_cache(self, context: Context, *, whole: bool) -> DynamicCache:
        """See `Context.to_hf_cache`."""
        self._weights_of(context)
        return self._exchange.to_hf_cache(context, self.model.config, whole=whole)

    def context_from_hf_cache(
        self,
        cache: DynamicCache,
        prompt: Prompt,
        *,
        adapter: str | None = None,
        tenant: str = DEFAULT_TENANT,
        name: str | None = None,
    ) -> Context:
        """A context from a transformers cache and the tokens it was computed from.

        kvcomm did not compute this KV and cannot vouch for it: the context is marked approximate, so nothing of it is
        ever offered to other requests.

        Raises:
            InvalidRequest: the cache does not fit the model or the tokens.
            PoolExhausted: no pages for it.
            EngineClosed: the engine has been closed, before or meanwhile.
        """
        segments = self.read_prompt(prompt, is_start=True)
        weights = self._adapters.weights(adapter)
        token_ids = _token_ids(segments)
        keys, values = self._exchange.from_hf_cache(cache, token_ids)

        def finish(sequence: Sequence) -> Context:
            return Context(
                self, sequence, tenant=tenant, weights=weights, adapter=adapter, name=name, segments=segments
            )

        return self._exchange.place(self.home(tenant), token_ids, keys, values, Fidelity.APPROXIMATE, finish)

    def memory_stats(self) -> MemoryStats:
        """Where the pages are."""
        with self.lock:
            # First: these give forgotten pages back.
            in_contexts, in_requests = self._holdings.pages_in_contexts(), self._holdings.pages_in_requests()
            return MemoryStats(
                num_pages=self.pool.num_pages,
                num_free=self.pool.num_free,
                num_cached=num_distinct(self.tree.pages_held()),
                num_in_contexts=num_distinct(in_contexts),
                num_in_requests=num_distinct(in_requests),
                page_bytes=self.pool.page_bytes,
                bytes_copied=self.pool.bytes_copied,
            )

    def check_integrity(self) -> None:
        """Prove that every page reference is held by exactly who should hold it.

        Raises:
            AssertionError: with all the numbers.
        """
        with self.lock:
            for sequence in self._holdings.sequences:
                sequence.check_integrity()
            moved = self.reuse.pages_held(self.scheduler.requests())
            moved = itertools.chain(moved, self._tiering.pages_held())
            held = [*self._holdings.pages_in_contexts(), *self._holdings.pages_in_requests(), *moved]
            self.memory.check_integrity(held)

    def set_quota(
        self, *, cached_tokens: int | None = None, held_tokens: int | None = None, tenant: str = DEFAULT_TENANT
    ) -> None:
        """Limit a tenant; None is no limit, and each call sets both.

        Args:
            cached_tokens: of its cached prefixes, and of the renditions of its segments, with each adapter; over it the
                tenant's own least recently used ones are dropped, never those of others.
            held_tokens: of its contexts and requests in flight at once; over it requests are refused (QuotaExceeded).

        Raises:
            InvalidRequest: a limit that is no whole number, or negative.
        """
        page_size = self.config.page_size
        cached_tokens, held_tokens = _limit("cached_tokens", cached_tokens), _limit("held_tokens", held_tokens)
        with self.lock:
            num_pages = None if cached_tokens is None else cached_tokens // page_size
            self._cached_pages.pop(tenant, None)
            if num_pages is not None:
                self._cached_pages[tenant] = num_pages
            for namespace in self.namespaces(tenant):
                self._limit(namespace, num_pages)
            self._holdings.set_quota(self.home(tenant), None if held_tokens is None else held_tokens // page_size)

    def pin(self, prompt: Prompt, *, adapter: str | None = None, tenant: str = DEFAULT_TENANT) -> int:
        """Keep the cached part of a prompt from eviction and TTL; returns how many tokens that is."""
        token_ids = _token_ids(self.read_prompt(prompt, is_start=True))
        with self.lock:
            return self.tree.pin(self.namespace(tenant, adapter=adapter), token_ids)

    def unpin(self, prompt: Prompt, *, adapter: str | None = None, tenant: str = DEFAULT_TENANT) -> int:
        """Undo one `pin`; returns how many tokens it concerned."""
        token_ids = _token_ids(self.read_prompt(prompt, is_start=True))
        with self.lock:
            return self.tree.unpin(self.namespace(tenant, adapter=adapter), token_ids)

    def num_cached(self, prompt: Prompt, *, adapter: str | None = None, tenant: str = DEFAULT_TENANT) -> int:
        """Leading tokens of a prompt whose KV is cached; looking does not count as use."""
        token_ids = _token_ids(self.read_prompt(prompt, is_start=True))
        with self.lock:
            return self.tree.peek(self.namespace(tenant, adapter=adapter), token_ids)

    def clear_cache(self, *, tenant: str | None = None) -> None:
        """Drop cached prefixes, of one tenant or of all; contexts keep what they refer to."""
        with self.lock:
            for namespace in (None,) if tenant is None else self.namespaces(tenant):
                self.memory.reset(namespace)

    def forget(self, tenant: str) -> None:
        """Drop all that is known of a tenant: cache, quotas, anchors and calibrations.

        What its contexts and requests hold stays theirs; they may leave something new.
        """
        with self.lock:
            self.set_quota(tenant=tenant)
            for namespace in self.namespaces(tenant):
                self.memory.reset(namespace)
                self.memory.renditions.forget(namespace)
                self.reuse.forget(namespace)

    def learn(
        self,
        prompt: Prompt,
        *,
        estimators: Iterable[str] = ("token",),
        adapter: str | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> Future[int]:
        """Teach estimators from a prompt whose named segments are also known from other contexts.

        Done in idle time; the future gives how many tokens were kept. Requests under a policy that learns do this by
        themselves, until the anchors suffice.

        Raises:
            InvalidRequest: the prompt is empty, or this engine has no such estimator.
        """
        segments, names = self.read_prompt(prompt, is_start=True), tuple(estimators)
        self.reuse.planner.require_known(map(Rung, names))
        weights = self._adapters.weights(adapter)
        future = self.reuse.learner.learn(self._namespace(weights, tenant), weights, segments, names)
        self._loop.wake()
        return future

    def calibrate(
        self,
        prompt: Prompt,
        answer: Iterable[int],
        policy: ReusePolicy,
        *,
        adapter: str | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> Future[Pair | None]:
        """Add a prompt to the pairs of its reader, with the anchors as they are.

        Done in idle time; the future gives the pair, None if nothing of the prompt can be moved. Requests under a
        policy that learns do this by themselves.

        Args:
            answer: token ids of the exact greedy answer; the first 32 are looked at.
            policy: says which rungs.

        Raises:
            InvalidRequest: the prompt or the answer is empty, or a rung names what this engine does not have.
        """
        segments, tokens = self._read_case(prompt, answer)
        self.reuse.planner.require_known(policy.rungs)
        weights = self._adapters.weights(adapter)
        future = self.reuse.learner.calibrate(self._namespace(weights, tenant), weights, segments, tokens, policy)
        self._loop.wake()
        return future

    def measure(
        self,
        prompt: Prompt,
        answer: Iterable[int],
        rungs: Iterable[Rung],
        *,
        adapter: str | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> Future[list[Outcome]]:
        """What moved KV would have cost a prompt, one outcome per rung; none if nothing of it can be moved.

        Done in idle time. Both sides are computed for it, exact and moved; nothing of it is kept.

        Args:
            answer: token ids of the exact greedy answer; the first 32 are looked at.

        Raises:
            InvalidRequest: the prompt or the answer is empty, or a rung names what this engine does not have.
        """
        wanted = tuple(rungs)
        self.reuse.planner.require_known(wanted)
        segments, tokens = self._read_case(prompt, answer)
        weights = self._adapters.weights(adapter)
        future = self.reuse.learner.measure(self._namespace(weights, tenant), weights, segments, tokens, wanted)
        self._loop.wake()
        return future

    def warm(
        self,
        prompts: Iterable[Prompt],
        policy: ReusePolicy | None = None,
        *,
        progress: Progress = False,
        adapter: str | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> list[Gained]:
        """Learn from examples at once what requests like them would teach by and by.

        Every prompt is answered exactly; then it is measured for all rungs of the policy, and after that its anchors
        are taught, so no prompt is judged by its own anchors. Sources are the prompts before it. Requests of others go
        on meanwhile and come first.

        Args:
            policy: that requests will come under; None: the engine's.
            progress: True: a bar on stderr; or what to call with how much is done, see `Done`.

        Returns:
            What each reader has gained, in the order of their first prompts.

        Raises:
            InvalidRequest: there are no prompts, one holds nothing that could be moved, or the policy is exact; names
                it, and nothing has run.
            EngineClosed: the engine has been closed, before or meanwhile.
        """
        return warm(self, prompts, _policy(policy) or self.policy, progress, adapter=adapter, tenant=tenant)

    @overload
    def reuse_status(
        self,
        reader: None = None,
        *,
        policy: ReusePolicy | None = None,
        tenant: str = DEFAULT_TENANT,
        adapter: str | None = None,
    ) -> list[ReaderStatus]: ...

    @overload
    def reuse_status(
        self,
        reader: Reader | Prompt,
        *,
        policy: ReusePolicy | None = None,
        tenant: str = DEFAULT_TENANT,
        adapter: str | None = None,
    ) -> ReaderStatus: ...

    def reuse_status(
        self,
        reader: Reader | Prompt | None = None,
        *,
        policy: ReusePolicy | None = None,
        tenant: str = DEFAULT_TENANT,
        adapter: str | None = None,
    ) -> ReaderStatus | list[ReaderStatus]:
        """What a reader has, and what is missing until its text is moved, in numbers.

        Args:
            reader: a reader, the first digits of its digest, or the segments of a prompt, whose reader need not have
                been seen; None: every reader there is, the one used last at the end.
            policy: that requests come under; None: the engine's.

        Raises:
            InvalidRequest: a reader that the tenant does not have, or a prompt that holds nothing to be moved.
        """
        wanted = _policy(policy) or self.policy
        found = None if reader is None or isinstance(reader, str | Reader) else reader_of(self._movable(reader))
        with self._lock:
            namespace = self.namespace(tenant, adapter=adapter)
            known = [standing.reader for standing in self.reuse.book.standings(namespace)]
            if reader is None:
                return [status_of(self.reuse, namespace, each, wanted) for each in known]
            if found is None:
                digest = reader.digest if isinstance(reader, Reader) else str(reader)
                matching = [each for each in known if digest and each.digest.startswith(digest)]
                if len(matching) != 1:
                    raise InvalidRequest(_unknown_reader(digest, len(matching), len(known), tenant))
                (found,) = matching
            return status_of(self.reuse, namespace, found, wanted)

    def _movable(self, prompt: Prompt) -> tuple[Segment, ...]:
        """The segments of a prompt. Raises InvalidRequest unless one has a name."""
        segments = self.read_prompt(prompt, is_start=True)
        require_movable(segments, "this prompt")
        return segments

    def readers(self, tenant: str = DEFAULT_TENANT, *, adapter: str | None = None) -> list[Standing]:
        """What is known about everybody into whose prompts text was moved, or could have been; live objects."""
        with self._lock:
            return list(self.reuse.book.standings(self.namespace(tenant, adapter=adapter)))

    def save_anchors(self, folder: str | Path, *, adapter: str | None = None, tenant: str = DEFAULT_TENANT) -> Profile:
        """Write what a tenant has learned about moving text: anchor banks, pairs of readers, what audits said.

        Raises:
            AnchorFileError: a file cannot be written; what was there under that name is untouched.
        """
        return self.reuse.save(Path(folder), self.namespace(tenant, adapter=adapter))

    def load_anchors(self, folder: str | Path, *, adapter: str | None = None, tenant: str = DEFAULT_TENANT) -> Profile:
        """Take over what `save_anchors` wrote for the same model and tenant, all of it or nothing.

        Where banks are missing in the folder, what was measured with anchors is left out.

        Raises:
            AnchorFileForeign: of another model or tenant, or of larger banks than this engine keeps.
            AnchorFileCorrupt, AnchorFileTooNew, AnchorFileError: damaged, newer, unreadable.
        """
        return self.reuse.load(Path(folder), self.namespace(tenant, adapter=adapter))

    def share_anchors(self, *, adapter: str | None = None, tenant: str = DEFAULT_TENANT) -> bool:
        """Write to the tier now what a tenant has learned about moving text; see `save_anchors`.

        An engine does so by itself now and then, and when it is closed. False: nothing is known, there is no tier, or
        it could not be written.
        """
        weights = self._adapters.weights(adapter)
        space = self._tiering.space_of(weights, tenant)
        return self._shared_learning.put(self._namespace(weights, tenant), space)

    def take_anchors(self, *, adapter: str | None = None, tenant: str = DEFAULT_TENANT) -> Profile | None:
        """Take over what the tier has of it; see `load_anchors`. None: the tier has nothing, or there is none.

        An engine that knows nothing of a tenant does so by itself with the first request that may move text.

        Raises:
            AnchorFileError: what is there is refused; see the subclasses.
        """
        weights = self._adapters.weights(adapter)
        space = self._tiering.space_of(weights, tenant)
        return self._shared_learning.get(self._namespace(weights, tenant), space)

    def _read_case(self, prompt: Prompt, answer: Iterable[int]) -> tuple[tuple[Segment, ...], tuple[int, ...]]:
        segments, tokens = self.read_prompt(prompt, is_start=True), tuple(answer)
        if not tokens:
            raise InvalidRequest("an empty answer cannot be replayed; generate at least one token")
        return segments, tokens

    def require_open(self) -> None:
        """Raises EngineClosed once the engine has been closed."""
        self._loop.require_open()

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Wait until no request runs and all idle work is done; False after `timeout_s`."""
        return self._loop.wait_idle(timeout_s)

    @property
    def tier(self) -> Tier | None:
        """Where exact prefixes are shared with other engines, if anywhere."""
        return self._tiering.tier

    def tier_space(self, tenant: str = DEFAULT_TENANT) -> TierSpace:
        """What a tenant's snapshots and the like go by in the tier, whatever the weights become.

        Raises:
            InvalidRequest: the tenant is no text.
        """
        return self._tiering.space_of(self._first_weights, values.text("the tenant", tenant))

    def flush_tier(self, timeout_s: float | None = None) -> bool:
        """Wait until the tier has what was computed so far; False after `timeout_s`. Closing does so for 2 s."""
        return self._tiering.flush(timeout_s)

    def held(self) -> AbstractContextManager[None]:
        """Let the engine stand still: within, nothing is computed and nothing learned, whatever is asked of it.

        For measurements, and for whoever needs the machine for a moment. Requests can be submitted; waiting for one
        within, or closing the engine, would never end.
        """
        return self._loop.held()

    def wake(self) -> None:
        """Make sure that what has been queued beside requests is worked on."""
        self._loop.wake()

    def close(self) -> None:
        """Fail what is in flight and end the engine's thread. Idempotent."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make_memory(self) -> Memory:
        pool = PagePool(
            layer_shapes(self.geometry),
            num_pages=self.config.num_pages(self.geometry.kv_bytes_per_token),
            page_size=self.config.page_size,
            dtype=self.geometry.dtype,
            device=self.model.device,
        )
        half = pool.num_pages * pool.page_bytes // 2
        return Memory(
            pool,
            ttl_s=self.config.cache_ttl_s,
            rendition_bytes=half,
            eviction=self.config.eviction,
            require_held=holding(self._lock),
        )

    def _model_identity(self, weights: str, attention: Mapping[str, str] | None = None) -> str:
        return model_identity(
            weights_digest=weights,
            config=self.model.config,
            dtype=self.geometry.dtype,
            attention={"backend": self.backend.name} if attention is None else attention,
            tokenizer=self.tokenizer,
            chat_template=getattr(self.tokenizer, "chat_template", None),
        )


def _close(loop: EngineLoop, tiering: Tiering, learning: SharedLearning, own_tier: Tier | None) -> None:
    """End an engine; not a method, for it must not keep the engine alive."""
    tiering.stop_reading()
    loop.close()
    learning.close()
    tiering.close()
    if own_tier is not None:
        own_tier.close()


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer, from the generation config and the tokenizer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return frozenset(int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None)


def _prior(prior: Prior | Literal["shipped"] | None, model: str) -> Prior | None:
    """The prior that was asked for; `model`: digest of what it has to hold for."""
    if prior is None:
        return None
    if prior == "shipped":
        return find_prior(model)
    if not isinstance(prior, Prior):
        raise InvalidRequest(
            f'prior must be a Prior, as kvcomm.align.prior.read_prior(file) gives, "shipped" or None, not '
            f"{values.told(prior)}"
        )
    require_prior_fits(prior, model)
    return prior


def _tier(tier: Tier | str | None) -> Tier | None:
    if isinstance(tier, str):
        return None
    if not isinstance(tier, Tier | None):
        raise InvalidRequest(f"tier must be a Tier, as Tier.open(url) gives, a URL or None, not {values.told(tier)}")
    return tier


def _policy(policy: ReusePolicy | None) -> ReusePolicy | None:
    if not isinstance(policy, ReusePolicy | None):
        raise InvalidRequest(
            f"policy must be a ReusePolicy, not {values.told(policy)}; exact reuse is ReusePolicy.exact()"
        )
    return policy


def _unknown_reader(digest: str, num_matching: int, num_known: int, tenant: str) -> str:
    which = "no reader" if not num_matching else f"{num_matching} readers"
    return (
        f"{which} {digest[:MAX_TEXT]!r} among {num_known} of tenant {tenant!r}; reuse_status() lists those that have "
        "been asked, and segments of a prompt tell about one that has not"
    )


def _limit(name: str, value: int | None) -> int | None:
    limit = None if value is None else values.whole_number(name, value)
    if limit is not None and limit < 0:
        raise InvalidRequest(f"{name} must be None (no limit) or 0 or more, not {limit}")
    return limit


def _token_ids(segments: Iterable[Segment]) -> list[int]:
    return [token for segment in segments for token in segment.token_ids]
