"""Shards, simulated: what every rank would hold and compute, against the whole model's KV and attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvcomm.errors import UnsupportedModel
from kvcomm.integrations.vllm.sharding import Shard, space_of
from kvcomm.memory.pool import LayerShape
from kvcomm.tiers.space import TierSpace


def space(num_kv_heads: list[int]) -> TierSpace:
    shapes = tuple(LayerShape(heads, 4, 2) for heads in num_kv_heads)
    return TierSpace("model", "kvcomm", "default", shapes, torch.float32, 100)


def ranks(size: int) -> list[Shard]:
    return [Shard(rank, size) for rank in range(size)]


@pytest.mark.parametrize(("num_kv_heads", "size"), [(8, 2), (2, 2), (2, 8), (1, 4)])
def test_every_head_is_written_once(num_kv_heads: int, size: int) -> None:
    written = [head for shard in ranks(size) if shard.writes(num_kv_heads) for head in shard.heads(num_kv_heads)]
    assert written == list(range(num_kv_heads))


def naive_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of [num_tokens, heads, dim], one number at a time; query heads share KV heads in groups."""
    num_tokens, num_heads, dim = queries.shape
    group = num_heads // keys.shape[1]
    out = torch.zeros(num_tokens, num_heads, values.shape[2])
    for token in range(num_tokens):
        for head in range(num_heads):
            scores = [float(queries[token, head] @ keys[at, head // group]) / math.sqrt(dim) for at in range(token + 1)]
            weights = [math.exp(score - max(scores)) for score in scores]
            for at, weight in enumerate(weights):
                out[token, head] += weight / sum(weights) * values[at, head // group]
    return out


@pytest.mark.parametrize(("num_kv_heads", "size"), [(4, 2), (2, 4), (1, 2), (4, 4)])
def test_attention_by_shards_is_that_of_the_whole(num_kv_heads: int, size: int) -> None:
    generator = torch.Generator().manual_seed(num_kv_heads * 10 + size)
    queries = torch.randn(5, 8, 4, generator=generator)
    keys, values = (torch.randn(5, num_kv_heads, 4, generator=generator) for _ in range(2))
    parts = []
    for shard in ranks(size):
        heads, own = list(shard.heads(num_kv_heads)), 8 // size
        parts.append(naive_attention(queries[:, shard.rank * own :][:, :own], keys[:, heads], values[:, heads]))
    assert torch.allclose(torch.cat(parts, dim=1), naive_attention(queries, keys, values), atol=1e-6)


@pytest.mark.parametrize(("num_kv_heads", "size"), [(3, 2), (4, 3), (2, 3)])
def test_uneven_shares_are_refused_by_name(num_kv_heads: int, size: int) -> None:
    with pytest.raises(UnsupportedModel, match=f"{num_kv_heads} KV heads cannot be shared by {size}"):
        Shard(0, size).heads(num_kv_heads)


def test_there_is_no_such_rank() -> None:
    with pytest.raises(ValueError, match="no rank 2 of 2"):
        Shard(2, 2)


def test_spaces_differ_by_heads_and_not_by_rank() -> None:
    whole = space([2])
    assert space_of(whole, Shard(0, 1)) == whole
    first, copy, other = (space_of(whole, Shard(rank, 4)) for rank in range(3))
    assert first == copy
    assert first.namespace != other.namespace
    assert first.namespace == space_of(whole, Shard(0, 2)).namespace  # the same head, however many hold it
    assert first.shapes[0].num_kv_heads == 1
