"""The engine: one model, its pool and tree, and the requests and contexts on them.

It puts the parts together, and has what users call. What else there is to one part is behind it: `engine.cache`,
`engine.reuse`, `engine.texts`, `engine.grammars`. What happens inside a step is the scheduler's matter.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvcomm import values
from kvcomm.align.ladder import Rung
from kvcomm.config import EngineConfig
from kvcomm.engine.assembly import Ground, WhichPrior, Workings, opened_prior
from kvcomm.engine.chat_template import Messages
from kvcomm.engine.context import Context
from kvcomm.engine.context_list import ContextList
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.language import Language
from kvcomm.engine.open_prompt import DEADLINE_S, OpenPrompt
from kvcomm.engine.restoring import restored, taken_over
from kvcomm.engine.results import Completion
from kvcomm.engine.sampling import SamplingParams, SamplingSettings, sampling_params
from kvcomm.engine.settings import EngineSettings, RequestSettings
from kvcomm.engine.warming import Gained, Progress, warm
from kvcomm.errors import InvalidRequest
from kvcomm.memory.segments import Prompt, Segment
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.loading import load_model
from kvcomm.plain import MAX_TEXT
from kvcomm.reuse.lesson import Lesson
from kvcomm.reuse.plan import Explanation
from kvcomm.reuse.policy import ReusePolicy, checked_policy
from kvcomm.starting import collector_paused
from kvcomm.tiers.space import DEFAULT_TENANT
from kvcomm.tiers.tier import Tier


class Engine:
    """Exact KV reuse, forks and continuous batching over a Hugging Face decoder.

    The model is used as it is and stays usable by itself. Thread-safe; usable in a `with` statement, which closes it.

    Attributes:
        cache: what is kept for later requests: pins, quotas, numbers.
        reuse: what is known about moving text: learning, measuring, saving, and what is missing.
        texts: of tokens, as answers are written.
        grammars: makes grammars ready before requests need them.
        adapters: LoRA and the like, that requests, contexts and agents may name.
        tiering: what is shared with other engines through a tier.
        tenancy: whose KV is whose.
        requests: how many wait and run.
        max_context: tokens the model may see at most, prompt and answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        config: EngineConfig | None = None,
        policy: ReusePolicy | None = None,
        weights_id: str | None = None,
        prior: WhichPrior = "shipped",
        tier: Tier | str | None = None,
    ) -> None:
        """Make an engine of a model that is loaded.

        Args:
            model: a decoder on its device, in its dtype; it is put into eval mode. Adapters that PEFT has put into its
                layers may be named by requests, also where the model is wrapped in a `PeftModel`.
            weights_id: identity of the weights without adapters, if known; else they are hashed (0.2 s per GB or so).
            prior: pairs measured on this model beforehand, or their file; by default those that come with kvcomm, if
                any do.
            tier: where exact prefixes are shared with other engines, or its URL, see `Tier.open`; an engine closes what
                it opened. What is wrong with it later costs time, never an answer.

        Raises:
            UnsupportedModel: its KV cannot be cached soundly.
            InvalidRequest: the attention back end asked for does not run here, or the prior is none.
            AnchorFileForeign: the prior is of another model.
            AnchorFileError: its file cannot be read.
            TierError: there can be no tier at that URL.
        """
        self.config = config or EngineConfig()
        self.policy = checked_policy(policy) or ReusePolicy.exact()
        self._ground = ground = Ground.make(model, tokenizer, self.config, weights_id)
        self._language = language = Language.make(ground.model, ground.geometry, tokenizer)
        self._workings = work = Workings.make(self.config, self.policy, ground, language, prior, tier, id(self))
        self.model, self.geometry, self.backend, self.live = ground.model, ground.geometry, ground.backend, ground.live
        self.memory, self.pool, self.tree = ground.memory, ground.memory.pool, ground.memory.tree
        self.runner, self.prior_model, self.lock = ground.runner, ground.prior_model, ground.lock
        self.max_context, self.vocab_size = ground.geometry.max_context, ground.geometry.vocab_size
        self.dtype, self.attention = ground.geometry.dtype, ground.backend.name
        self.tokenizer, self.encoder = language.tokenizer, language.encoder
        self.texts, self.grammars = language.texts, language.grammars
        self.tenancy, self.cache, self.reuse, self.scheduler = work.tenancy, work.cache, work.reuse, work.scheduler
        self.adapters, self.tiering, self._tools = ground.adapters, work.tiering, work.tools
        self.requests = work.tools.maker
        self._finalizer = weakref.finalize(self, work.close)

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        weights: str | None = None,
        progress: bool = False,
        **settings: Unpack[EngineSettings],
    ) -> Engine:
        """Load a packaged model ("smollm2-135m"), a folder, a GGUF file or a hub id.

        Args:
            weights: "int8" or "int4" keeps weights in fewer bits; see `load_model` for this and those before it.
            settings: config, policy, prior and tier of the engine, as in its constructor.

        Raises:
            InvalidRequest: kept weights, a dtype or a device that cannot be used here, or a prior that is none.
            ModelLoadError: unknown, not fetchable, wrong hash, damaged folder; one clear line each.
            UnsupportedModel: its KV cannot be cached soundly.
            AnchorFileError: the prior's file cannot be read, found before the model is loaded, or is of another model.
        """
        settings["prior"] = opened_prior(settings.get("prior", "shipped"))
        with collector_paused():
            loaded = load_model(name, dtype=dtype, device=device, weights=weights, progress=progress)
            return cls(loaded.model, loaded.tokenizer, weights_id=loaded.weights_digest, **settings)

    def __repr__(self) -> str:
        # Without the lock: whoever looks at an engine waits for nobody, and the numbers are about those of now.
        name = Path(str(self.model.config.name_or_path)).name or type(self.model).__name__
        pages = f"{self.pool.num_pages} pages of {self.config.page_size}"
        num_requests = self.scheduler.num_waiting + self.scheduler.num_running
        state = "closed" if self.scheduler.is_closed else "running"
        where = f"{name[:MAX_TEXT]}, {str(self.model.dtype).removeprefix('torch.')}, {self.model.device}"
        return f"Engine({where}, {pages}, {len(self._tools.living)} contexts, {num_requests} requests, {state})"

    @property
    def contexts(self) -> ContextList:
        """Contexts that have not been released."""
        with self.lock:
            return ContextList.of(self._tools.living.values(), self.texts.decode)

    def namespace(self, tenant: str = DEFAULT_TENANT, *, adapter: str | None = None) -> str:
        """Digest under which a tenant's KV is cached now; differs with all that the KV depends on.

        Raises:
            InvalidRequest: the tenant is no text.
            UnknownAdapter: there is none of that name.
            WeightsChanged, UnsupportedModel: nothing can be computed with what the model has become.
        """
        return self.tenancy.namespace(self.adapters.weights(adapter), tenant)

    def home(self, tenant: str = DEFAULT_TENANT) -> str:
        """What digests of a tenant's segments are made with, and its quotas go by, whatever the weights are."""
        return self.tenancy.home(tenant)

    def weights_changed(self) -> None:
        """Tell the engine that the model computes something else now, where it cannot see that by itself.

        It sees what `kvcomm.model.live` lists, which is nearly all. What is cached so far will not be found again, nor
        can snapshots be restored that were made before, or elsewhere.
        """
        self.live.forget()

    def segment(self, text: str, *, name: str | None = None) -> Segment:
        """A text tokenized on its own, as a piece of a prompt, to be used in prompts as often as you like.

        Its ids are the same wherever it stands: a space that the tokenizer puts before texts is left out. Control
        tokens in it are real.
        """
        return self._language.reader.segment(text, name=name)

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
            policy: how far reuse may depart from exact results, here and later; None: the engine's.

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
        weights = self.adapters.weights(adapter)
        start = KVSequence(self.pool)
        return Context(
            self._tools, start, tenant=tenant, weights=weights, adapter=adapter, name=name, policy=policy, keeps=self
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
        **settings: Unpack[SamplingSettings],
    ) -> RequestHandle:
        """Start a request; wait for it, stream it or cancel it through the handle.

        Args:
            sampling: how to draw; or its fields by name. `json_schema` beside either of them is short for
                `grammar=Grammar.json_schema(...)`.
            adapter: that computes it, see `load_adapter`; None: the model as its user has left it at this moment.
            policy: how far reuse may depart from the exact answer; None: the engine's. Only named segments are moved.
            rung: for comparisons: reuse at exactly this rung, with no bound, instead of as the policy allows.
            lesson: serve exactly, and learn all of this from it in idle time; see `warm`.
            reads_cache: False: compute the whole prompt, whatever is cached; what was computed is cached all the same.

        Raises:
            InvalidRequest: empty, too long, unknown tokens, bad sampling settings, unknown adapter.
            WeightsChanged: nothing can be computed with what the model has become.
            PoolTooSmall: it would not even fit an empty pool.
            EngineClosed: the engine has been closed.
        """
        params = sampling_params(sampling, settings)
        wanted = ReusePolicy.exact() if lesson is not None else policy
        request = self._tools.maker.make_first(prompt, params, tenant=tenant, policy=wanted, adapter=adapter)
        if rung is not None:
            if params.prompt_logprobs is not None:
                raise InvalidRequest("prompt_logprobs are those of a prompt that is computed, so there can be no rung")
            self.reuse.require_known([rung])
        request.rung, request.lesson = rung, lesson
        request.reads_cache = request.reads_cache and reads_cache
        self._workings.loop.submit(request)
        request.handle.keeps = self
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
            adapter: as in `submit`, and so `policy`.
            deadline_s: seconds after which it is given up if it is not complete by then.

        Raises:
            InvalidRequest: empty, too long, unknown tokens, unknown adapter, a deadline that is no positive number.
            WeightsChanged: nothing can be computed with what the model has become.
            EngineClosed: the engine has been closed.
        """
        opened = self._tools.open_prompts.open_first(prompt, adapter, tenant, checked_policy(policy), deadline_s)
        opened.keeps = self
        return opened

    def generate(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **settings: Unpack[RequestSettings]
    ) -> Completion:
        """`submit` and wait for the result; raises what `submit` and `RequestHandle.result` raise."""
        return self.submit(prompt, sampling, **settings).result()

    def chat(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        tools: Iterable[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        **settings: Unpack[RequestSettings],
    ) -> Completion:
        """`generate` of `chat_prompt`; raises what those raise. To stream, submit the prompt."""
        return self.generate(self.chat_prompt(messages, tools=tools, variables=variables), sampling, **settings)

    def chat_prompt(
        self,
        messages: Messages,
        *,
        tools: Iterable[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> tuple[Segment, ...]:
        """The prompt of a conversation, as the model's chat template writes it: for `submit`, `context` and the like.

        What messages, tools and variables may be, and what is refused: `ChatPrompts.segments`.

        Args:
            add_generation_prompt: put the beginning of an answer behind them.
        """
        speaks = values.truth_value("add_generation_prompt", add_generation_prompt)
        segments = self._language.chats.segments(messages, tools=tools, variables=variables, speaks=speaks)
        return self.read_prompt(segments, is_start=True)

    def explain(
        self,
        prompt: Prompt,
        *,
        adapter: str | None = None,
        tenant: str = DEFAULT_TENANT,
        policy: ReusePolicy | None = None,
    ) -> Explanation:
        """The plan of a request that is not made: what would come from the cache, what not, why, and what it takes.

        Counts as no use of the cache, and asks no tier. Raises what `submit` does.
        """
        nothing = SamplingParams(max_new_tokens=0)
        request = self._tools.maker.make_first(prompt, nothing, tenant=tenant, policy=policy, adapter=adapter)
        request.is_trial = True
        explained = self.scheduler.explain(request)
        if explained.cold_s is None:
            self.reuse.parts.measure_when_idle()
        return explained

    def read_prompt(self, prompt: Prompt, *, is_start: bool) -> tuple[Segment, ...]:
        """The checked segments of a prompt; see `PromptReader.read`."""
        return self._language.reader.read(prompt, is_start=is_start)

    def restore(self, file: str | Path, *, adapter: str | None = None, tenant: str = DEFAULT_TENANT) -> Context:
        """A context from a snapshot.

        Args:
            adapter: that computed it, whatever its name was then; see `context`.

        Raises:
            SnapshotError: unreadable, altered, too new, or of another model, adapter or tenant; see the subclasses.
            PoolExhausted: no pages for it.
            EngineClosed: the engine has been closed, before or meanwhile.
        """
        return restored(self._tools, Path(file), adapter, tenant, keeps=self)

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
            PoolExhausted, EngineClosed: as in `restore`.
        """
        return taken_over(self._tools, cache, prompt, adapter, tenant, name, keeps=self)

    def check_integrity(self) -> None:
        """Prove that every page reference is held by exactly who should hold it. Raises AssertionError with numbers."""
        self._workings.check_integrity(self.memory)

    def forget(self, tenant: str) -> None:
        """Drop all that is known of a tenant but what its contexts and requests hold; they may leave something new."""
        self._workings.forget(tenant, self.memory)

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
        wanted = checked_policy(policy) or self.policy
        return warm(self.reuse, self.submit, self.require_open, prompts, wanted, progress, adapter, tenant)

    def require_open(self) -> None:
        """Raises EngineClosed once the engine has been closed."""
        self._workings.loop.require_open()

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Wait until no request runs and all idle work is done; False after `timeout_s`."""
        return self._workings.loop.wait_idle(timeout_s)

    def held(self) -> AbstractContextManager[None]:
        """Within, nothing is computed or learned: for measurements, and for whoever needs the machine for a moment.

        Requests can be submitted; waiting for one within, or closing the engine, would never end.
        """
        return self._workings.loop.held()

    def close(self) -> None:
        """Fail what is in flight and end the engine's thread. Idempotent."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
