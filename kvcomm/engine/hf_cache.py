"""Adapters between pages and transformers' `DynamicCache`, both ways. Both copy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin
from transformers.configuration_utils import PreTrainedConfig

from kvcomm.errors import InvalidRequest
from kvcomm.model.geometry import ModelGeometry


def to_cache(keys: Sequence[Tensor], values: Sequence[Tensor], config: PreTrainedConfig) -> DynamicCache:
    """A cache that stock `generate` continues.

    Args:
        keys, values: per layer [num_tokens, num_kv_heads, dim], owned by the cache from now on.
        config: of the model; layers with a sliding window keep only what they may still see.
    """
    cache = DynamicCache(config=config)
    for layer_id, (key, value) in enumerate(zip(keys, values, strict=True)):
        # Layers that use another layer's KV have no place of their own.
        if layer_id < len(cache.layers) and isinstance(cache.layers[layer_id], CacheLayerMixin):
            cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], layer_id)
    return cache


def from_cache(cache: DynamicCache, geometry: ModelGeometry, num_tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values per layer, [num_tokens, num_kv_heads, dim], views of the cache.

    Raises:
        InvalidRequest: other layers, shapes or dtype than the model's, more than one sequence, or a layer that has
            already dropped tokens outside its window.
    """
    if len(cache.layers) != len(geometry.layers):
        raise InvalidRequest(f"the cache has {len(cache.layers)} layers, the model {len(geometry.layers)}")
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for layer_id, (stored, layer) in enumerate(zip(cache.layers, geometry.layers, strict=True)):
        for kind, tensor, dim, into in (
            ("keys", getattr(stored, "keys", None), layer.key_dim, keys),
            ("values", getattr(stored, "values", None), layer.value_dim, values),
        ):
            wanted = (1, layer.num_kv_heads, num_tokens, dim)
            if tensor is None or tuple(tensor.shape) != wanted or tensor.dtype != geometry.dtype:
                found = "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
                raise InvalidRequest(
                    f"{kind} of layer {layer_id} are {found}, wanted {wanted} {geometry.dtype} "
                    "(a layer with a sliding window drops early tokens: import the cache before it does)"
                )
            into.append(tensor[0].transpose(0, 1))
    return keys, values
