"""Every use that kvcomm makes of private parts of vLLM, in one file.

The rest of the folder speaks to `VllmModel` (the model in a worker: passes, pages) and to the few functions on requests
below. `needed.missing_names` says what a vLLM of another version lacks; `VllmModel` measures at start that what is left
does what it did (`check`). Whatever is amiss is an UnsupportedModel with one line, and vLLM serves without kvcomm.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcomm.errors import UnsupportedModel
from kvcomm.integrations.vllm.decoder import Attend
from kvcomm.integrations.vllm.fair_lock import FairLock
from kvcomm.integrations.vllm.layout import LayerLayout, Probe, measure
from kvcomm.integrations.vllm.needed import version
from kvcomm.integrations.vllm.sharding import Shard
from kvcomm.memory.pool import LayerShape

logger = logging.getLogger("kvcomm.vllm")

NUM_PROBED = 40
"""Tokens of the prompt by which both are compared."""

SALT = "kvcomm-"


def producer(num_ranks: int = 1) -> str:
    """Whose kernels compute vLLM's KV, as it stands in the names of what is stored.

    Sums over tensor-parallel ranks are rounded in an order of their own, so their number is a part of it.
    """
    from vllm.platforms import current_platform

    kind = "cpu" if current_platform.is_cpu() else str(current_platform.device_type)
    ranks = f"-tp{num_ranks}" if num_ranks > 1 else ""
    return f"vllm-{kind}{ranks}/{version().split('+')[0]}"


def shard_of(config: Any) -> Shard:
    """Which tensor-parallel rank this worker is."""
    from vllm.distributed import get_tensor_model_parallel_rank

    size = int(config.parallel_config.tensor_parallel_size)
    return Shard(get_tensor_model_parallel_rank() if size > 1 else 0, size)


def num_kv_heads(config: Any) -> int:
    """KV heads of each layer of the whole model."""
    return int(config.model_config.get_total_num_kv_heads())


def isolate(request: Any) -> None:
    """Give a request's blocks hashes that nobody else can name, before any of them is computed.

    What is not exact then never serves anybody else through vLLM's prefix cache.
    """
    request.cache_salt = SALT + uuid.uuid4().hex
    del request.block_hashes[:]
    request.update_block_hashes()


def why_foreign(request: Any) -> str | None:
    """Why the tokens of a request do not say what its KV is, or None if they do."""
    if getattr(request, "lora_request", None) is not None:
        return "lora"
    if getattr(request, "mm_features", None) or getattr(request, "prompt_embeds", None) is not None:
        return "not text alone"
    if request.prompt_token_ids is None or getattr(request, "pooling_params", None) is not None:
        return "not a prompt of tokens"
    if request.cache_salt and not request.cache_salt.startswith(SALT):
        return "its client's own salt"
    if getattr(request, "skip_reading_prefix_cache", False):
        return "it reads no cache"
    return None


def why_unsupported(config: Any, kv_cache_config: Any) -> str | None:
    """Why kvcomm serves nothing in this vLLM, or None; one line with the name of the setting."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    parallel = config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        return f"pipeline_parallel_size is {parallel.pipeline_parallel_size}: no worker has all layers"
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"{name} is {getattr(parallel, name)}: no worker has all tokens"
    if config.cache_config.cache_dtype != "auto":
        return f"kv_cache_dtype is {config.cache_config.cache_dtype}: quantized KV is not moved or stored"
    if config.speculative_config is not None:
        return "speculative decoding: KV of draft models is not kept"
    groups = kv_cache_config.kv_cache_groups
    kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
        return f"KV groups {', '.join(kinds)}: only one group of full attention is served, no sliding windows"
    if getattr(groups[0].kv_cache_spec, "sliding_window", None) is not None:
        return "layers with a sliding window"
    if getattr(config.model_config, "uses_mrope", False):
        return "positions of more than one dimension"
    return None


def why_not_moved(config: Any) -> str | None:
    """Why text is not moved in this vLLM, although exact KV is served; or None."""
    parallel = config.parallel_config
    for name in ("tensor_parallel_size", "data_parallel_size"):
        if getattr(parallel, name) > 1:
            return f"{name} is {getattr(parallel, name)}: the passes of its workers would have to agree"
    if config.lora_config is not None:
        return "LoRA is enabled: layers compute with the adapters of vLLM's latest step"
    return None


class VllmModel:
    """The model of a worker, and the pages of its KV. A `Host` of kvcomm's engine."""

    def __init__(self, config: Any, runner: Any, kv_cache_config: Any, turns: FairLock) -> None:
        """Measures where KV lies; call before any request is served: blocks are overwritten.

        Raises:
            UnsupportedModel: by name, what of this model or vLLM is not known.
        """
        self.turns = turns
        self._config = config
        self._runner = runner
        self._module = runner.get_model()
        self._layers = _layers(config)
        self.block_size = int(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
        self._num_blocks = int(kv_cache_config.num_blocks)
        first = self._layers[0].kv_cache
        self._device: torch.device = first.device
        self._dtype: torch.dtype = first.dtype
        if self._dtype != config.model_config.dtype:
            raise UnsupportedModel(f"KV is kept in {self._dtype}, the model is in {config.model_config.dtype}")
        self._layouts = [self._measure(layer) for layer in self._layers]
        self._check_pages()

    @property
    def device(self) -> torch.device:
        """Device of the model and its KV."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of KV and logits."""
        return self._dtype

    @property
    def num_layers(self) -> int:
        """Layers with KV."""
        return len(self._layers)

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """What each layer keeps of a token."""
        return tuple(LayerShape(layer.num_kv_heads, layer.head_size, layer.head_size) for layer in self._layers)

    @torch.inference_mode()
    def hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """See `decoder.Host`. Waits for its turn."""
        with self.turns.guest(), self._synchronized():
            return self._compute(token_ids, positions, attend)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See `decoder.Host`. Waits for its turn."""
        with self.turns.guest(), self._synchronized():
            found: Tensor = self._module.compute_logits(hidden)
            return found

    @torch.inference_mode()
    def read(self, blocks: Sequence[int], start: int, end: int) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of keys and values, per layer [end - start, num_kv_heads, dim], of positions in pages."""
        pages = torch.tensor(blocks, device=self._device)
        found = [layout.read(pages, start, end) for layout in self._layouts]
        return [keys for keys, _ in found], [values for _, values in found]

    @torch.inference_mode()
    def write(self, blocks: Sequence[int], start: int, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Put keys and values, per layer [num_tokens, num_kv_heads, dim], into pages from position `start` on."""
        slots = self._slots(blocks, start, start + len(keys[0]))
        for layer, key, value in zip(self._layers, keys, values, strict=True):
            moved = (each.to(self._device, self._dtype).contiguous() for each in (key, value))
            layer.impl.do_kv_cache_update(layer, *moved, layer.kv_cache, slots)

    def probe(self, own: Callable[[list[int]], tuple[list[Tensor], list[Tensor]]]) -> Probe:
        """Compute a few tokens with vLLM's own attention and compare; blocks are overwritten.

        Args:
            own: gives keys and values of token ids, per layer [num_tokens, num_kv_heads, dim], by kvcomm's kernels.
        """
        vocab_size = self._config.model_config.get_vocab_size()
        token_ids = [int(0.1 * vocab_size + 0.8 * vocab_size * i / NUM_PROBED) for i in range(NUM_PROBED)]
        try:
            theirs = self._compute_in_pages(token_ids)
            ours = own(token_ids)
        except Exception as error:
            logger.warning("kvcomm's KV cannot be compared with vLLM's (%r): it does not count as exact", error)
            return Probe(None)
        pairs = zip((*theirs[0], *theirs[1]), (*ours[0], *ours[1]), strict=True)
        return Probe(max(float((a.float() - b.float()).abs().max()) for a, b in pairs))

    @contextmanager
    def _synchronized(self) -> Iterator[None]:
        """On an accelerator, what was begun before a pass has ended, and so has the pass."""
        if self._device.type == "cpu":
            yield
            return
        torch.accelerator.synchronize()
        try:
            yield
        finally:
            torch.accelerator.synchronize()

    @contextmanager
    def _attending(self, attend: Attend) -> Iterator[None]:
        """Every layer hands its attention to `attend`: by a `forward` of its own, laid over its class's."""
        try:
            for layer_id, layer in enumerate(self._layers):
                vars(layer)["forward"] = _forward(layer_id, layer, attend)
            yield
        finally:
            for layer in self._layers:
                vars(layer).pop("forward", None)

    def _compute(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        from vllm.forward_context import set_forward_context

        context = set_forward_context(None, self._config, num_tokens=len(token_ids), skip_compiled=True)
        with context, self._attending(attend):
            return self._call(token_ids, positions)

    def _call(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        output = self._module(input_ids=token_ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)
        if not isinstance(output, Tensor):
            raise UnsupportedModel(f"{type(self._module).__name__} gives {type(output).__name__}, not hidden states")
        return output

    @torch.inference_mode()
    def _compute_in_pages(self, token_ids: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Compute tokens with vLLM's attention on its own pages, as its runner would, and read their KV."""
        from vllm.forward_context import set_forward_context
        from vllm.v1.attention.backend import CommonAttentionMetadata

        num = len(token_ids)
        blocks = list(range(1, 1 + -(-num // self.block_size)))
        slots = self._slots(blocks, 0, num)
        lengths = torch.tensor([0, num], dtype=torch.int32)
        ids, positions = torch.tensor(token_ids, device=self._device), torch.arange(num, device=self._device)
        common = CommonAttentionMetadata(
            query_start_loc=lengths.to(self._device),
            query_start_loc_cpu=lengths,
            seq_lens=lengths[1:].to(self._device),
            num_reqs=1,
            num_actual_tokens=num,
            max_query_len=num,
            max_seq_len=num,
            block_table_tensor=torch.tensor([blocks], dtype=torch.int32, device=self._device),
            slot_mapping=slots,
            causal=True,
            positions=positions,
        )
        metadata: dict[str, Any] = {}
        for group in (group for groups in self._runner.attn_groups for group in groups):
            built = group.get_metadata_builder(0).build(0, common)
            metadata |= dict.fromkeys(group.layer_names, built)
        mapping = dict.fromkeys(metadata, slots)
        context = set_forward_context(metadata, self._config, num_tokens=num, slot_mapping=mapping, skip_compiled=True)
        with self.turns.guest(), context:
            self._call(ids, positions)
        return self.read(blocks, 0, num)

    def _slots(self, blocks: Sequence[int], start: int, end: int) -> Tensor:
        positions = torch.arange(start, end)
        table = torch.tensor(blocks)
        slots = table[positions // self.block_size] * self.block_size + positions % self.block_size
        return slots.to(self._device)

    @torch.inference_mode()
    def _measure(self, layer: Any) -> LayerLayout:
        def write(key: Tensor, value: Tensor, slots: Tensor) -> None:
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)

        return measure(layer.kv_cache, self._num_blocks, self.block_size, layer.num_kv_heads, layer.head_size, write)

    @torch.inference_mode()
    def _check_pages(self) -> None:
        """Write random KV over two blocks in the wrong order, and read it again."""
        blocks, start = [2, 1], self.block_size // 2
        num = 2 * self.block_size - start
        shapes = [(num, layer.num_kv_heads, layer.head_size) for layer in self._layers]
        random = torch.Generator().manual_seed(0)
        keys, values = ([torch.randn(shape, generator=random).to(self._dtype) for shape in shapes] for _ in "kv")
        self.write(blocks, start, keys, values)
        got_keys, got_values = self.read(blocks, start, start + num)
        for got, given in zip((*got_keys, *got_values), (*keys, *values), strict=True):
            if not torch.equal(got.cpu(), given):
                raise UnsupportedModel("KV that is written to vLLM's pages is not what is read from them")


def worker_class() -> type[Any]:
    """The worker that vLLM takes on this platform."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker  # type: ignore[no-any-return, unused-ignore]
    return base_worker_class()


class Inside(NamedTuple):
    """What runs in this process where vLLM's engine does, for evaluations and tests.

    Attributes:
        connector: the scheduler's side.
        worker: the worker's side.
        num_free_blocks: of KV, now.
        drain: makes steps until nothing is left to do, such as saving.
    """

    connector: Any
    worker: Any
    num_free_blocks: Callable[[], int]
    drain: Callable[[], None]


def inside(llm: Any) -> Inside:
    """What runs in a `vllm.LLM` whose engine runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0)."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    client = llm.llm_engine.engine_core
    scheduler = client.engine_core.scheduler

    def drain() -> None:
        while scheduler.has_requests():
            client.get_output()

    pool = scheduler.kv_cache_manager.block_pool
    return Inside(scheduler.connector, get_kv_transfer_group(), pool.get_num_free_blocks, drain)


def base_worker_class() -> type[Any]:
    """What the workers of all platforms descend from."""
    from vllm.v1.worker.gpu_worker import Worker

    return Worker  # type: ignore[no-any-return, unused-ignore]


def name_connector(name: str, module: str) -> None:
    """Let `kv_connector` name a class in a module; harmless where it is named already."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if name not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(name, module, name)


def attach_to(worker: Any, kv_cache_config: Any) -> None:
    """Tell kvcomm's connector in a worker, if there is one, where model and pages are; see `connector`."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if not has_kv_transfer_group():
        return
    group = get_kv_transfer_group()
    for connector in (group, *getattr(group, "_connectors", ())):
        attach = getattr(connector, "attach_kvcomm", None)
        if attach is not None:
            attach(worker, kv_cache_config)


def quieten() -> None:
    """Let vLLM not say at every pass that threads are set by itself: kvcomm's loops ask for as many as there are."""
    name = "vllm.v1.worker.cpu_worker"
    logging.getLogger(name).addFilter(lambda record: "set_num_threads" not in record.getMessage())


def take_turns(runner: Any, turns: FairLock, while_empty: Callable[[], None]) -> None:
    """Let a model runner's steps wait for kvcomm's passes, and the other way round.

    Args:
        while_empty: called before a step without tokens, outside of its turn.
    """
    execute, sample = runner.execute_model, runner.sample_tokens

    def execute_model(scheduler_output: Any, *arguments: Any, **keywords: Any) -> Any:
        num_tokens = scheduler_output.total_num_scheduled_tokens
        if num_tokens == 0:
            while_empty()
        with turns.host(num_tokens):
            return execute(scheduler_output, *arguments, **keywords)

    def sample_tokens(*arguments: Any, **keywords: Any) -> Any:
        with turns.host(1):
            return sample(*arguments, **keywords)

    runner.execute_model, runner.sample_tokens = execute_model, sample_tokens


def _layers(config: Any) -> list[Any]:
    """The layers with KV, in order."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    named = config.compilation_config.static_forward_context
    foreign = sorted({type(layer).__name__ for layer in named.values() if not isinstance(layer, Attention)})
    if foreign or not named:
        raise UnsupportedModel(f"layers of kind {', '.join(foreign) or 'none'} are not plain attention")
    layers = [named[name] for name in sorted(named, key=extract_layer_index)]
    for layer in layers:
        asked = [
            name
            for name, given in (
                ("sliding window", layer.sliding_window),
                ("sinks", layer.has_sink),
                ("alibi slopes", getattr(layer.impl, "alibi_slopes", None) is not None),
                ("soft cap", getattr(layer.impl, "logits_soft_cap", None)),
                ("KV of another layer", layer.kv_sharing_target_layer_name),
            )
            if given
        ]
        if asked:
            raise UnsupportedModel(f"attention of {layer.layer_name} has {', '.join(asked)}")
        if layer.head_size != layer.head_size_v or not hasattr(layer.impl, "do_kv_cache_update"):
            raise UnsupportedModel(f"{type(layer.impl).__name__} does not write KV in a way that is known")
    return layers


def _forward(layer_id: int, layer: Any, attend: Attend) -> Callable[..., Tensor]:
    scale = float(layer.impl.scale)

    def forward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        num = len(query)
        attended = attend(
            layer_id,
            query.view(num, layer.num_heads, layer.head_size),
            key.view(num, layer.num_kv_heads, layer.head_size),
            value.view(num, layer.num_kv_heads, layer.head_size),
            scale,
        )
        return attended.reshape(num, -1)

    return forward
