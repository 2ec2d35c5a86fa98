"""Contexts of KV that comes from elsewhere: from snapshots, and from caches of transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from transformers import DynamicCache

from kvcomm.engine.context import Context
from kvcomm.engine.context_tools import ContextTools
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.segments import Prompt, token_ids_of


def restored(tools: ContextTools, file: Path, adapter: str | None, tenant: str, *, keeps: object) -> Context:
    """See `Engine.restore` and, for `keeps`, `Context`."""
    weights = tools.adapters.weights(adapter)
    state, keys, values = tools.exchange.load(file, tools.tenancy.namespace(weights, tenant))

    made = partial(Context, tools, tenant=tenant, weights=weights, adapter=adapter, keeps=keeps)
    finish = partial(made, name=state.name, segments=state.segments, last_logits=state.last_logits, note=state.note)
    return tools.exchange.place(tools.tenancy.home(tenant), state.token_ids, keys, values, state.fidelity, finish)


def taken_over(
    tools: ContextTools,
    cache: DynamicCache,
    prompt: Prompt,
    adapter: str | None,
    tenant: str,
    name: str | None,
    *,
    keeps: object,
) -> Context:
    """See `Engine.context_from_hf_cache` and, for `keeps`, `Context`."""
    segments = tools.language.reader.read(prompt, is_start=True)
    weights, token_ids = tools.adapters.weights(adapter), token_ids_of(segments)
    keys, values = tools.exchange.from_hf_cache(cache, token_ids)

    finish = partial(
        Context, tools, tenant=tenant, weights=weights, adapter=adapter, name=name, segments=segments, keeps=keeps
    )
    return tools.exchange.place(tools.tenancy.home(tenant), token_ids, keys, values, Fidelity.APPROXIMATE, finish)
