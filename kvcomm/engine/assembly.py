"""How an engine is put together, from below: model and memory, and what works on them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvcomm import values
from kvcomm.align.prior import Prior, find_prior, read_prior, require_prior_fits
from kvcomm.config import EngineConfig
from kvcomm.engine.adapters import Adapters
from kvcomm.engine.cache import Cache
from kvcomm.engine.context_tools import ContextTools
from kvcomm.engine.exchange import KVExchange, layer_shapes
from kvcomm.engine.holdings import Holdings
from kvcomm.engine.language import Language
from kvcomm.engine.loop import EngineLoop
from kvcomm.engine.making import RequestMaker
from kvcomm.engine.open_prompt import OpenPrompts
from kvcomm.engine.scheduler import Scheduler
from kvcomm.engine.tenancy import Tenancy
from kvcomm.engine.tiering import Tiering, tier_space
from kvcomm.errors import InvalidRequest
from kvcomm.memory.lock_rule import holding
from kvcomm.memory.memory import Memory
from kvcomm.memory.pool import PagePool
from kvcomm.model.adapters import without_wrapper
from kvcomm.model.attention import make_backend
from kvcomm.model.attention.contract import AttentionBackend
from kvcomm.model.geometry import ModelGeometry
from kvcomm.model.live import LiveWeights, Weights
from kvcomm.model.namespace import model_identity
from kvcomm.model.runner import ModelRunner
from kvcomm.reuse.budget import KNOWN_LOAN_S, LOAN_S, Budget
from kvcomm.reuse.parts import ReuseParts
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.reuse import Reuse, Whose
from kvcomm.tiers.space import DEFAULT_TENANT
from kvcomm.tiers.tier import Tier

WhichPrior = Prior | str | Path | None
"""The prior that an engine begins with, or its file; "shipped": the one that comes with kvcomm, if there is any for its
model."""


@dataclass(frozen=True, eq=False)
class Ground:
    """A model, the memory for its KV, and what runs it.

    Attributes:
        first_weights: those that the model had when the engine was made.
        lock: guards all state; held while state changes, not during a forward pass.
        prior_model: what priors of the model go by.
    """

    model: PreTrainedModel
    geometry: ModelGeometry
    backend: AttentionBackend
    live: LiveWeights
    adapters: Adapters
    first_weights: Weights
    memory: Memory
    runner: ModelRunner
    lock: RLock
    prior_model: str

    @classmethod
    def make(
        cls, given: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EngineConfig, weights_id: str | None
    ) -> Self:
        """See `Engine`; `given`: the model, or PEFT's wrapper around it."""
        model = without_wrapper(given)
        geometry = ModelGeometry.from_model(model)
        backend = make_backend(config.attention, model.device, geometry.layers)
        live = LiveWeights(model.eval(), weights_id)

        def identify(weights: str, attention: Mapping[str, str] | None = None) -> str:
            return model_identity(
                weights_digest=weights,
                config=model.config,
                dtype=geometry.dtype,
                attention={"backend": backend.name} if attention is None else attention,
                tokenizer=tokenizer,
                chat_template=getattr(tokenizer, "chat_template", None),
            )

        adapters = Adapters(given, model, live, identify)
        lock = RLock()
        memory = _make_memory(model, geometry, config, lock)
        runner = ModelRunner(
            model,
            keys=memory.pool.keys,
            values=memory.pool.values,
            page_size=config.page_size,
            backend=backend,
            live=live,
        )
        first = live.now()
        prior_model = identify(first.digest, {})
        return cls(model, geometry, backend, live, adapters, first, memory, runner, lock, prior_model)


@dataclass(frozen=True, eq=False)
class Workings:
    """What works on requests and contexts of one engine.

    Attributes:
        tools: of contexts; knows most of the rest.
        own_tier: the tier, where the engine has opened it itself.
    """

    holdings: Holdings
    tenancy: Tenancy
    tiering: Tiering
    reuse: Reuse
    scheduler: Scheduler
    loop: EngineLoop
    cache: Cache
    exchange: KVExchange
    tools: ContextTools
    own_tier: Tier | None

    @classmethod
    def make(
        cls,
        config: EngineConfig,
        policy: ReusePolicy,
        ground: Ground,
        language: Language,
        prior: WhichPrior,
        tier: Tier | str | None,
        engine_id: int,
    ) -> Self:
        """See `Engine` and `RequestMaker`."""
        memory, adapters, lock, reader = ground.memory, ground.adapters, ground.lock, language.reader
        known = _prior_for(ground.prior_model, prior)
        parts = ReuseParts.make(
            config,
            memory,
            ground.geometry,
            ground.runner,
            lock,
            adapters.home(DEFAULT_TENANT),
            language.ends,
            known,
        )
        holdings = Holdings(memory.pool, lambda: scheduler.requests(), lambda: scheduler.read_along)
        prior_weights = None if known is None else ground.first_weights.digest
        tenancy = Tenancy(adapters, memory, holdings, parts.book, lock, prior_weights=prior_weights)
        own_tier = Tier.open(tier) if isinstance(tier, str) else None
        space_of = partial(tier_space, adapters, ground.geometry)
        tiering = Tiering(
            own_tier or _checked_tier(tier),
            memory,
            parts.cost,
            lock,
            space_of=space_of,
            first_weights=ground.first_weights,
        )
        parts.when_published(tiering.published)
        reuse = Reuse(
            parts,
            policy,
            tiering.tier,
            read=partial(reader.read, is_start=True),
            whose=partial(_whose, adapters, tenancy),
            space_of=space_of,
        )
        scheduler = Scheduler(
            config,
            memory,
            ground.runner,
            parts.planner,
            parts.learner,
            parts.idle,
            lock,
            adapters=adapters,
            tiering=tiering,
            reclaim=holdings.reclaim,
            require_quota=partial(holdings.require_quota, num_held=0),
        )
        budget = Budget(config.learning_share, LOAN_S if known is None else KNOWN_LOAN_S)
        loop = EngineLoop(scheduler, parts.idle, budget, config.idle_after_s)
        exchange = KVExchange(memory, ground.geometry, holdings, lock, loop.require_open)
        maker = RequestMaker(
            config,
            memory.pool,
            ground.live,
            policy,
            scheduler,
            reuse,
            tenancy=tenancy,
            holdings=holdings,
            language=language,
            engine_id=engine_id,
        )
        open_prompts = OpenPrompts(
            scheduler,
            loop,
            maker,
            language,
            adapters=adapters,
            pool=memory.pool,
            tenancy=tenancy,
            lock=lock,
            max_context=ground.geometry.max_context,
        )
        tools = ContextTools(
            lock=lock,
            adapters=adapters,
            tenancy=tenancy,
            language=language,
            maker=maker,
            scheduler=scheduler,
            loop=loop,
            open_prompts=open_prompts,
            holdings=holdings,
            exchange=exchange,
            repairer=parts.repairer,
            config=ground.model.config,
            living=weakref.WeakValueDictionary(),
        )
        cache = Cache(memory, holdings, tenancy, reader, lock, adapters.weights)
        return cls(holdings, tenancy, tiering, reuse, scheduler, loop, cache, exchange, tools, own_tier)

    def check_integrity(self, memory: Memory) -> None:
        """See `Engine.check_integrity`."""
        with self.tools.lock:
            for sequence in self.holdings.sequences:
                sequence.check_integrity()
            moved = self.reuse.parts.pages_held(self.scheduler.requests())
            in_contexts, in_requests = self.holdings.pages_in_contexts(), self.holdings.pages_in_requests()
            memory.check_integrity([*in_contexts, *in_requests, *moved, *self.tiering.pages_held()])

    def forget(self, tenant: str, memory: Memory) -> None:
        """See `Engine.forget`."""
        with self.tools.lock:
            self.cache.set_quota(tenant=tenant)
            for namespace in self.tenancy.namespaces(tenant):
                memory.reset(namespace)
                memory.renditions.forget(namespace)
                self.reuse.parts.forget(namespace)

    def close(self) -> None:
        """Fail what is in flight, end the engine's thread, and give the tier what is left for it."""
        self.tiering.stop_reading()
        self.loop.close()
        self.reuse.close()
        self.tiering.close()
        if self.own_tier is not None:
            self.own_tier.close()


def _make_memory(model: PreTrainedModel, geometry: ModelGeometry, config: EngineConfig, lock: RLock) -> Memory:
    pool = PagePool(
        layer_shapes(geometry),
        num_pages=config.num_pages(geometry.kv_bytes_per_token),
        page_size=config.page_size,
        dtype=geometry.dtype,
        device=model.device,
    )
    half = pool.num_pages * pool.page_bytes // 2
    return Memory(
        pool,
        ttl_s=config.cache_ttl_s,
        rendition_bytes=half,
        eviction=config.eviction,
        is_held=holding(lock),
    )


def _whose(adapters: Adapters, tenancy: Tenancy, tenant: str, adapter: str | None) -> Whose:
    weights = adapters.weights(adapter)
    return Whose(tenancy.namespace(weights, tenant), weights)


def opened_prior(prior: WhichPrior) -> WhichPrior:
    """What was asked for, with a file read, so that a wrong one is found before a model is loaded for it.

    Raises:
        InvalidRequest: it is none of what a prior may be.
        AnchorFileError: its file cannot be read.
    """
    found = read_prior(prior) if isinstance(prior, str | Path) and prior != "shipped" else prior
    if found is None or isinstance(found, Prior | str):
        return found
    raise InvalidRequest(
        f'prior must be a Prior, a file as `python -m eval.prior` writes it, "shipped" or None, not '
        f"{values.told(prior)}"
    )


def _prior_for(model: str, prior: WhichPrior) -> Prior | None:
    """The prior that was asked for; `model`: digest of what it has to hold for."""
    found = opened_prior(prior)
    if not isinstance(found, Prior):
        return None if found is None else find_prior(model)
    require_prior_fits(found, model)
    return found


def _checked_tier(tier: Tier | str | None) -> Tier | None:
    if isinstance(tier, str):
        return None
    if not isinstance(tier, Tier | None):
        raise InvalidRequest(f"tier must be a Tier, as Tier.open(url) gives, a URL or None, not {values.told(tier)}")
    return tier
