"""A worker's side of the connector: what it builds at start, and what it does in each step.

Nothing here may raise for what a request asked, a tier did or vLLM became: vLLM would end.
"""

from __future__ import annotations

import logging
from typing import Any

from kvcomm.engine.engine import Engine
from kvcomm.errors import KVCommError, UnsupportedModel
from kvcomm.integrations.vllm import adapter, layout
from kvcomm.integrations.vllm.fair_lock import FairLock
from kvcomm.integrations.vllm.inner import kv_of, make_engine, namespace_of
from kvcomm.integrations.vllm.messages import Forget, Jobs, Load, Prepare, Prepared, Release, Save, WorkerJob
from kvcomm.integrations.vllm.preparation import Preparations
from kvcomm.integrations.vllm.settings import ConnectorSettings
from kvcomm.integrations.vllm.sharding import space_of
from kvcomm.integrations.vllm.shelf import ENGINE_PRODUCER, TierShelf, whole_shapes
from kvcomm.model.attention import preferred_backend
from kvcomm.model.loading import LoadedModel, load_model
from kvcomm.tiers.space import DEFAULT_TENANT
from kvcomm.tiers.tier import Tier, TierSpace

logger = logging.getLogger("kvcomm.vllm")

WORKER = "kvcomm.integrations.vllm.worker.KVCommWorker"

EMPTY_STEP_S = 0.05
"""Seconds that a step without tokens waits for what is being prepared, instead of asking again at once."""


class WorkerSide:
    """What the connector does in a worker; without a model (`attach`) it answers that nothing is ready."""

    def __init__(self, settings: ConnectorSettings) -> None:
        self._settings = settings
        self.probe = layout.Probe(None)
        self._preparations: Preparations | None = None
        self._block_size = 1
        self._unknown: dict[str, Prepared] = {}
        self._saved: set[str] = set()
        self._failed: set[int] = set()
        self._is_told = False

    @property
    def preparations(self) -> Preparations | None:
        """None: nothing is served here."""
        return self._preparations

    def attach(self, config: Any, worker: Any, kv_cache_config: Any) -> None:
        """Build what the settings ask for, once; whatever cannot be is said in one line, and left to vLLM."""
        if self._preparations is not None:
            return
        adapter.quieten()
        turns = FairLock(self._settings.learning_share)
        try:
            model = adapter.VllmModel(config, worker.model_runner, kv_cache_config, turns)
            # For a moment its weights are in memory twice: they say under which name kvcomm knows this model.
            loaded = load_model(config.model_config.model, dtype=model.dtype, device="cpu")
        except Exception as error:  # a vLLM that has changed says so by whatever it raises
            logger.warning("kvcomm serves nothing here, vLLM does all: %s", _told(error))
            return
        self._block_size = model.block_size
        engine, self.probe = self._make_engine(config, model, loaded)
        shelf = self._open_shelf(config, model, loaded, self.probe)
        self._preparations = Preparations(model, turns, engine, shelf)
        adapter.take_turns(worker.model_runner, turns, self._while_empty)

    def begin(self, step: Jobs) -> None:
        """Prepare, load and drop."""
        for job in step.jobs:
            if self._preparations is None:
                self._decline(job)
            elif isinstance(job, Prepare):
                self._preparations.begin(job)
            elif isinstance(job, Load):
                self._load(self._preparations, job)
            elif isinstance(job, Release):
                self._preparations.drop(job)
            elif isinstance(job, Forget):
                self._preparations.forget()

    def save(self, step: Jobs) -> None:
        """Copy what is saved."""
        for job in step.jobs:
            if isinstance(job, Save):
                try:
                    if self._preparations is not None:
                        self._preparations.save(job)
                except Exception as error:
                    logger.warning("request %s is not saved: %r", job.request_id, error)
                self._saved.add(job.request_id)

    def take_prepared(self) -> dict[str, Prepared]:
        """What became ready since the last call."""
        found, self._unknown = self._unknown, {}
        return found if self._preparations is None else found | self._preparations.take_prepared()

    def take_saved(self) -> set[str]:
        """Requests whose blocks are not needed any more."""
        saved, self._saved = self._saved, set()
        return saved

    def take_failed(self) -> set[int]:
        """Blocks that nothing was loaded into."""
        failed, self._failed = self._failed, set()
        return failed

    def close(self) -> None:
        """Give everything up."""
        if self._preparations is not None:
            self._preparations.close()
            self._preparations = None

    def _open_shelf(
        self, config: Any, model: adapter.VllmModel, loaded: LoadedModel, probe: layout.Probe
    ) -> TierShelf | None:
        settings = self._settings
        if settings.tier is None:
            return None
        try:
            shard = adapter.shard_of(config)
            space = TierSpace(
                namespace=namespace_of(loaded, preferred_backend(model.device)),
                producer=adapter.producer(shard.size),
                tenant=DEFAULT_TENANT,
                shapes=whole_shapes(model.shapes, adapter.num_kv_heads(config)),
                dtype=model.dtype,
                vocab_size=loaded.model.get_output_embeddings().weight.shape[0],
            )
            own = space_of(space, shard)
            if own.shapes != model.shapes:
                raise UnsupportedModel(f"rank {shard.rank} of {shard.size} holds other heads than are known")
            tier = Tier.open(settings.tier, secret=settings.secret, max_bytes=settings.tier_bytes)
        except Exception as error:
            logger.warning("the tier is not used: %s", _told(error))
            return None
        return TierShelf(
            tier,
            own,
            also_from=(ENGINE_PRODUCER,) if probe.is_exact else (),
            token_s=lambda: model.turns.token_s,
            read_s=settings.read_s,
            writes=any(shard.writes(shape.num_kv_heads) for shape in space.shapes),
        )

    def _make_engine(
        self, config: Any, model: adapter.VllmModel, loaded: LoadedModel
    ) -> tuple[Engine | None, layout.Probe]:
        if not self._settings.move:
            return None, layout.Probe(None)
        try:
            if (why := adapter.why_not_moved(config)) is not None:
                raise UnsupportedModel(why)
            engine = make_engine(model, loaded, self._settings)
        except Exception as error:
            logger.warning("nothing is moved, exact prefixes only: %s", _told(error))
            return None, layout.Probe(None)
        probe = model.probe(lambda token_ids: kv_of(engine, token_ids))
        logger.info("kvcomm's KV differs from vLLM's by %s at most", probe.difference)
        return engine, probe

    def _load(self, preparations: Preparations, load: Load) -> None:
        try:
            is_loaded = preparations.load(load)
        except Exception as error:
            logger.warning("request %s: its KV cannot be loaded: %r", load.request_id, error)
            is_loaded = False
        if not is_loaded:
            first, last = load.start // self._block_size, -(-load.end // self._block_size)
            self._failed.update(load.blocks[first:last])

    def _decline(self, job: WorkerJob) -> None:
        if isinstance(job, Prepare):
            self._unknown[job.request_id] = Prepared(0)
            if not self._is_told:
                self._is_told = True
                logger.warning("kvcomm has no model in this worker: start vLLM with --worker-cls %s", WORKER)

    def _while_empty(self) -> None:
        if self._preparations is not None and self._preparations.num_open:
            self._preparations.wait(EMPTY_STEP_S)


def _told(error: Exception) -> str:
    """An error in one line."""
    return str(error) if isinstance(error, KVCommError) else repr(error)
