"""Shards, simulated: what every rank would hold and compute, against the whole model's KV and attention."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcomm.errors import UnsupportedModel
from kvcomm.integrations.vllm.sharding import (
    Shard,
    all_shards,
    common_length,
    covering,
    cut,
    heads_of,
    join,
    space_of,
)
from kvcomm.memory.pool import LayerShape
from kvcomm.tiers.space import KV, TierSpace
from kvcomm.tiers.tier import Tier

sizes = st.sampled_from([1, 2, 4, 8])
head_counts = st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=3)


def numbered(num_kv_heads: list[int], num_tokens: int = 5, key_dim: int = 4, value_dim: int = 2) -> KV:
    """KV whose every number is another one."""

    def make(at: int, heads: int, dim: int) -> Tensor:
        return torch.arange(num_tokens * heads * dim, dtype=torch.float32).reshape(num_tokens, heads, dim) + 1e4 * at

    keys = [make(2 * at, heads, key_dim) for at, heads in enumerate(num_kv_heads)]
    values = [make(2 * at + 1, heads, value_dim) for at, heads in enumerate(num_kv_heads)]
    return KV(keys, values)


def space(num_kv_heads: list[int]) -> TierSpace:
    shapes = tuple(LayerShape(heads, 4, 2) for heads in num_kv_heads)
    return TierSpace("model", "kvcomm", "default", shapes, torch.float32, 100)


def same(left: KV, right: KV) -> bool:
    pairs = zip([*left.keys, *left.values], [*right.keys, *right.values], strict=True)
    return all(torch.equal(mine, other) for mine, other in pairs)


@given(head_counts, sizes)
def test_what_is_cut_is_joined_again(num_kv_heads: list[int], size: int) -> None:
    whole = numbered(num_kv_heads)
    parts = [cut(whole, shard) for shard in all_shards(size)]
    assert same(join(parts, num_kv_heads), whole)
    for shard, part in zip(all_shards(size), parts, strict=True):
        assert [each.shape[1] for each in part.keys] == [
            shape.num_kv_heads for shape in shard.shapes(space(num_kv_heads).shapes)
        ]


@given(head_counts, sizes, sizes)
def test_a_rank_finds_its_heads_in_what_another_number_of_ranks_wrote(
    num_kv_heads: list[int], written_by: int, read_by: int
) -> None:
    whole = numbered(num_kv_heads)
    for shard in all_shards(read_by):
        writers = covering(shard, written_by, num_kv_heads)
        found = heads_of(shard, writers, [cut(whole, writer) for writer in writers], num_kv_heads)
        assert same(found, cut(whole, shard))


@pytest.mark.parametrize(("num_kv_heads", "size"), [(8, 2), (2, 2), (2, 8), (1, 4)])
def test_every_head_is_written_once(num_kv_heads: int, size: int) -> None:
    written = [head for shard in all_shards(size) if shard.writes(num_kv_heads) for head in shard.heads(num_kv_heads)]
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
    for shard in all_shards(size):
        part = cut(KV([keys], [values]), shard)
        own = 8 // size
        parts.append(naive_attention(queries[:, shard.rank * own :][:, :own], part.keys[0], part.values[0]))
    assert torch.allclose(torch.cat(parts, dim=1), naive_attention(queries, keys, values), atol=1e-6)


@pytest.mark.parametrize(("num_kv_heads", "size"), [(3, 2), (4, 3), (2, 3)])
def test_uneven_shares_are_refused_by_name(num_kv_heads: int, size: int) -> None:
    with pytest.raises(UnsupportedModel, match=f"{num_kv_heads} KV heads cannot be shared by {size}"):
        Shard(0, size).heads(num_kv_heads)


def test_there_is_no_such_rank() -> None:
    with pytest.raises(ValueError, match="no rank 2 of 2"):
        Shard(2, 2)


def test_parts_that_do_not_fit_are_refused() -> None:
    whole = numbered([4])
    with pytest.raises(ValueError, match="holds 2 heads, not 4"):
        join([whole, whole], [4])
    with pytest.raises(ValueError, match=r"no part holds the heads \[2, 3\] of 4"):
        heads_of(Shard(0, 1), [Shard(0, 2)], [cut(whole, Shard(0, 2))], [4])


def test_spaces_differ_by_heads_and_not_by_rank() -> None:
    whole = space([2])
    assert space_of(whole, Shard(0, 1)) == whole
    first, copy, other = (space_of(whole, Shard(rank, 4)) for rank in range(3))
    assert first == copy
    assert first.namespace != other.namespace
    assert first.namespace == space_of(whole, Shard(0, 2)).namespace  # the same head, however many hold it
    assert first.shapes[0].num_kv_heads == 1


def test_shards_share_a_tier(tmp_path: Path) -> None:
    """Two ranks save, one of them only half; four ranks, and one alone, read what both have."""
    whole, tokens, num_kv_heads = numbered([4, 4], num_tokens=8), list(range(8)), [4, 4]
    with_heads = space(num_kv_heads)
    tier = Tier.open(str(tmp_path), run_tokens=4)
    for shard in all_shards(2):
        part = cut(whole, shard)
        held = 8 if shard.rank == 0 else 4
        tier.put_prefix(space_of(with_heads, shard), tokens[:held], part.part(0, held))
    assert common_length(with_heads, 2, lambda each: tier.prefix_length(each, tokens)) == 4
    for shard in (*all_shards(4), Shard(0, 1)):
        writers = covering(shard, 2, num_kv_heads)
        parts = [tier.get_prefix(space_of(with_heads, writer), tokens, 0, 4) for writer in writers]
        assert all(isinstance(part, KV) for part in parts)
        found = heads_of(shard, writers, parts, num_kv_heads)  # type: ignore[arg-type]  # as was just seen
        assert same(found, cut(whole.part(0, 4), shard))
    assert tier.prefix_length(with_heads, tokens) == 0  # nobody wrote the whole model's
    tier.close()
