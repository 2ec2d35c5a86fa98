"""vLLM's connector interface, both roles: `--kv-transfer-config '{"kv_connector": "KVCommConnector", ...}'`.

The scheduler's side keeps the ledger and gives requests private salts; a worker's side prepares, loads and saves. What
they say to each other are `messages`. Nothing here may raise for what a request asked or a tier did: vLLM would end.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from kvcomm.errors import InvalidRequest, UnsupportedModel
from kvcomm.integrations.vllm import adapter, needed
from kvcomm.integrations.vllm.ledger import Ledger
from kvcomm.integrations.vllm.messages import Jobs, Prepared
from kvcomm.integrations.vllm.params import KEY, RequestParams, read_params
from kvcomm.integrations.vllm.preparation import Preparations
from kvcomm.integrations.vllm.settings import read_settings
from kvcomm.integrations.vllm.worker_side import WorkerSide

logger = logging.getLogger("kvcomm.vllm")


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc, unused-ignore]
    """From the scheduler to the workers."""

    step: Jobs = field(default_factory=Jobs)


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc, unused-ignore]
    """From the workers to the scheduler: what became ready, one answer of each worker by request."""

    prepared: dict[str, list[Prepared]] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMetadata:
        """Both workers' answers."""
        assert isinstance(other, WorkerMetadata)
        joined = {key: list(value) for key, value in self.prepared.items()}
        for key, value in other.prepared.items():
            joined.setdefault(key, []).extend(value)
        return WorkerMetadata(joined)


class KVCommConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc, unused-ignore]
    """One of the two sides, as vLLM makes them."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        if transfer.kv_load_failure_policy != "recompute":
            # What cannot be loaded is computed; the other policy would end the request.
            transfer.kv_load_failure_policy = "recompute"
        self._settings = read_settings(transfer.kv_connector_extra_config)
        self._off = _why_off(vllm_config, kv_cache_config)
        if self._off is not None and role is KVConnectorRole.SCHEDULER:
            logger.warning("kvcomm serves nothing here, vLLM does all: %s", self._off)
        if role is KVConnectorRole.SCHEDULER:
            self._ledger = Ledger(vllm_config.parallel_config.tensor_parallel_size)
            self._refused: dict[str, str] = {}
        else:
            self._worker = WorkerSide(self._settings)

    @property
    def requires_kv_delivery(self) -> bool:
        """Nobody waits for what is saved."""
        return False

    @property
    def ledger(self) -> Ledger:
        """The scheduler's side."""
        return self._ledger

    @property
    def preparations(self) -> Preparations | None:
        """A worker's side; None: it has no model."""
        return self._worker.preparations

    @property
    def difference(self) -> float | None:
        """Largest, of kvcomm's KV and vLLM's as measured at start; None: it was not."""
        return self._worker.probe.difference

    # The scheduler's side.

    def on_new_request(self, request: Any) -> None:
        """A request has arrived; one whose KV may be approximate gets a salt of its own before anything is computed."""
        if self._off is not None:
            return
        try:
            params = read_params(request.kv_transfer_params)
            if params is not None and request.prompt_token_ids is not None:
                params.require_fits(len(request.prompt_token_ids))
        except InvalidRequest as error:
            logger.warning("request %s: %s", request.request_id, error)
            self._refused[request.request_id] = str(error)
            return
        if adapter.why_foreign(request) is not None:
            return
        asked = params or RequestParams()
        moves = asked.may_move and self._settings.move
        has_tier = self._settings.tier is not None
        is_private = moves or (has_tier and asked.may_be_approximate)
        if is_private:
            adapter.isolate(request)
        if moves or has_tier:
            self._ledger.add(
                request.request_id,
                request.prompt_token_ids,
                asked,
                moves=moves,
                reads=has_tier,
                saves=has_tier and asked.save and not is_private,
                tells=params is not None,
            )

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that are ready behind those that vLLM has; None: ask later."""
        if self._off is not None:
            return 0, False
        return self._ledger.num_matched(request.request_id, request.num_tokens, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """A request has blocks, and is scheduled with tokens to be loaded."""
        if self._off is None and num_external_tokens:
            matched = self._ledger.num_matched(request.request_id, request.num_tokens, 0) or 0
            block_ids = blocks.get_block_ids()[0]
            self._ledger.allocated(request.request_id, block_ids, matched - num_external_tokens, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """What the workers are to do in this step."""
        jobs = [] if self._off is not None else self._ledger.take_jobs()
        return StepMetadata(Jobs(jobs, scheduler_output.total_num_scheduled_tokens))

    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers have said."""
        if self._off is not None:
            return
        found = connector_output.kv_connector_worker_meta
        if isinstance(found, WorkerMetadata):
            self._ledger.took(found.prepared)

    def reset_cache(self) -> bool:
        """Forget what is cached in kvcomm's own pool. What a tier has stays."""
        if self._off is None and self._role is KVConnectorRole.SCHEDULER:
            self._ledger.forget()
        return True

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended; True: its blocks are still to be read."""
        if self._off is not None:
            return False, None
        if (refused := self._refused.pop(request.request_id, None)) is not None:
            return False, {KEY: {"error": refused}}
        usage = self._ledger.usage(request.request_id)
        is_whole = request.status.name in ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")
        keeps = self._ledger.finished(
            request.request_id,
            list(request.all_token_ids),
            request.num_computed_tokens,
            block_ids[0] if block_ids else [],
            is_whole=is_whole,
        )
        return keeps, None if usage is None else {KEY: usage}

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The same, where there is one group."""
        return self.request_finished_all_groups(request, (block_ids,))

    def has_pending_push_work(self) -> bool:
        """Whether steps are wanted although there are no requests."""
        return False

    # A worker's side.

    def attach_kvcomm(self, worker: Any, kv_cache_config: Any) -> None:
        """The worker has its model and its pages."""
        if self._off is None:
            self._worker.attach(self._vllm_config, worker, kv_cache_config)

    def start_load_kv(self, forward_context: Any, **keywords: Any) -> None:
        """Begin what is new, and put what is ready into pages."""
        del forward_context, keywords
        self._worker.begin(self._get_connector_metadata().step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loaded already."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **keywords: Any) -> None:
        """Whole prompts are saved, when they have ended."""

    def wait_for_save(self) -> None:
        """Copy what is saved out of the pages."""
        if self.has_connector_metadata():
            self._worker.save(self._get_connector_metadata().step)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose blocks are read."""
        return self._worker.take_saved() or None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that hold nothing, to be computed by vLLM."""
        return self._worker.take_failed()

    def build_connector_worker_meta(self) -> WorkerMetadata | None:
        """What became ready."""
        prepared = self._worker.take_prepared()
        return WorkerMetadata({key: [value] for key, value in prepared.items()}) if prepared else None

    def shutdown(self) -> None:
        """vLLM ends."""
        if self._role is KVConnectorRole.WORKER:
            self._worker.close()


def _why_off(config: Any, kv_cache_config: Any) -> str | None:
    try:
        needed.require_known()
    except UnsupportedModel as error:
        return str(error)
    try:
        return adapter.why_unsupported(config, kv_cache_config)
    except Exception as error:  # settings of another version
        return f"vLLM {needed.version()} has other settings than are known ({error!r})"
