"""kvcomm's engine on the model of a vLLM worker."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import Tensor
from transformers import PreTrainedModel

from kvcomm.config import EngineConfig
from kvcomm.engine.context import PREFILL_ONLY
from kvcomm.engine.engine import Engine
from kvcomm.errors import UnsupportedModel
from kvcomm.integrations.vllm.decoder import Host, HostedDecoder
from kvcomm.integrations.vllm.settings import ConnectorSettings
from kvcomm.memory.segments import Segment
from kvcomm.model.loading import load_model


def make_engine(host: Host, name: str | Path, settings: ConnectorSettings) -> Engine:
    """An engine whose passes the host computes.

    Args:
        name: folder or hub id of the model. It is loaded beside the host's for a moment: its weights give the identity
            under which kvcomm knows this model everywhere, with its tokenizer, and how its keys turn.

    Raises:
        UnsupportedModel: its KV cannot be cached soundly.
        ModelLoadError: what vLLM has loaded cannot be loaded by transformers.
    """
    loaded = load_model(name, dtype=host.dtype, device="cpu")
    decoder = HostedDecoder(host, loaded.model)
    config = EngineConfig(
        pool_tokens=settings.pool_tokens,
        max_batch_tokens=settings.step_tokens,
        prefill_chunk=settings.step_tokens,
        learning_share=settings.learning_share,
    )
    engine = Engine(
        cast(PreTrainedModel, decoder),
        loaded.tokenizer,
        config=config,
        weights_id=loaded.weights_digest,
        prior=settings.prior,
    )
    if engine.geometry.immovable is not None:
        engine.close()
        raise UnsupportedModel(engine.geometry.immovable)
    return engine


def kv_of(engine: Engine, token_ids: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """KV of tokens by an engine, with nothing cached: per layer [num_tokens, num_kv_heads, dim]."""
    with engine.empty_context(tenant="probe") as context:
        context.submit(PREFILL_ONLY, prompt=[Segment(tuple(token_ids))]).result()
        cache = context.to_hf_cache(whole=True)
    engine.forget("probe")
    keys, values = [], []
    for layer in cache.layers:
        assert layer.keys is not None and layer.values is not None
        keys.append(layer.keys[0].transpose(0, 1))
        values.append(layer.values[0].transpose(0, 1))
    return keys, values
