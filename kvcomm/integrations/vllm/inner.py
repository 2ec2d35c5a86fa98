"""kvcomm's engine on the model of a vLLM worker."""

from __future__ import annotations

from typing import cast

from torch import Tensor
from transformers import PreTrainedModel

from kvcomm.config import EngineConfig
from kvcomm.engine.context import PREFILL_ONLY, Context
from kvcomm.engine.engine import Engine
from kvcomm.errors import UnsupportedModel
from kvcomm.integrations.vllm.decoder import Host, HostedDecoder
from kvcomm.integrations.vllm.settings import ConnectorSettings
from kvcomm.memory.segments import Segment
from kvcomm.model.loading import LoadedModel
from kvcomm.model.namespace import model_identity


def make_engine(host: Host, loaded: LoadedModel, settings: ConnectorSettings) -> Engine:
    """An engine whose passes the host computes.

    Args:
        loaded: the host's model as transformers has it: its weights' identity is the one under which kvcomm knows this
            model everywhere; the weights themselves are not kept.

    Raises:
        UnsupportedModel: its KV cannot be cached soundly.
        AnchorFileError, AnchorFileForeign: the prior cannot be read, or is of another model.
    """
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
    # Asking what a prompt would take has the machine measured in idle time, before the first request wants to know.
    engine.explain([Segment((0,))])
    return engine


def namespace_of(loaded: LoadedModel, backend: str) -> str:
    """What separates this model's KV from others' in a shared tier, without tenant; as kvcomm's engines have it.

    Args:
        backend: name of the attention back end that kvcomm takes on the host's device.
    """
    return model_identity(
        weights_digest=loaded.weights_digest,
        config=loaded.model.config,
        dtype=loaded.model.dtype,
        attention={"backend": backend},
        tokenizer=loaded.tokenizer,
        chat_template=getattr(loaded.tokenizer, "chat_template", None),
    )


def kv_of(engine: Engine, token_ids: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """KV of tokens by an engine, with nothing cached: per layer [num_tokens, num_kv_heads, dim]."""
    with engine.empty_context(tenant="probe") as context:
        context.submit(PREFILL_ONLY, prompt=[Segment(tuple(token_ids))]).result()
        found = kv_of_context(context)
    engine.forget("probe")
    return found


def kv_of_context(context: Context) -> tuple[list[Tensor], list[Tensor]]:
    """A copy of all KV of a context: per layer [num_tokens, num_kv_heads, dim]."""
    layers = context.to_hf_cache(whole=True).layers
    keys, values = ([getattr(layer, kind)[0].transpose(0, 1) for layer in layers] for kind in ("keys", "values"))
    return keys, values
