"""The reference against stock SDPA and against a loop over single scores, both without pages."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvcomm.model.attention.contract import RunTable
from kvcomm.model.attention.reference import paged_attention_reference

PAGE_SIZE = 4
NUM_PAGES = 200


class Sequences:
    """Whole sequences with contiguous keys and values, and the same ones scattered over pages.

    Slots that belong to no sequence hold NaN.
    """

    def __init__(self, lengths: list[int], num_kv_heads: int, key_dim: int, value_dim: int) -> None:
        rng = np.random.default_rng(0)
        generator = torch.Generator().manual_seed(0)
        free = rng.permutation(NUM_PAGES).astype(np.int32)
        self.key_cache = torch.full((NUM_PAGES * PAGE_SIZE, num_kv_heads, key_dim), torch.nan)
        self.value_cache = torch.full((NUM_PAGES * PAGE_SIZE, num_kv_heads, value_dim), torch.nan)
        self.keys: list[Tensor] = []  # [num_kv_heads, length, key_dim]
        self.values: list[Tensor] = []
        self.pages = []
        for length in lengths:
            num_pages = -(-length // PAGE_SIZE)
            pages, free = free[:num_pages], free[num_pages:]
            key = torch.randn(num_kv_heads, length, key_dim, generator=generator)
            value = torch.randn(num_kv_heads, length, value_dim, generator=generator)
            for position in range(length):
                slot = int(pages[position // PAGE_SIZE]) * PAGE_SIZE + position % PAGE_SIZE
                self.key_cache[slot] = key[:, position]
                self.value_cache[slot] = value[:, position]
            self.keys.append(key)
            self.values.append(value)
            self.pages.append(pages)


def random_query(num_heads: int, num_tokens: int, key_dim: int) -> Tensor:
    return torch.randn(1, num_heads, num_tokens, key_dim, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sliding_window", [None, 1, 5, 64, 1000])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 63, 300])
def test_whole_sequence_equals_stock_sdpa(length: int, sliding_window: int | None) -> None:
    sequences = Sequences([length], num_kv_heads=2, key_dim=8, value_dim=8)
    query = random_query(6, length, 8)
    positions = torch.arange(length)
    mask = positions <= positions[:, None]
    if sliding_window is not None:
        mask &= positions > positions[:, None] - sliding_window
    expected = scaled_dot_product_attention(
        query, sequences.keys[0][None], sequences.values[0][None], attn_mask=mask, scale=0.4, enable_gqa=True
    )
    out, _ = paged_attention_reference(
        query,
        sequences.key_cache,
        sequences.value_cache,
        [RunTable(sequences.pages[0], 0, length)],
        PAGE_SIZE,
        0.4,
        sliding_window,
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("sliding_window", [None, 3])
def test_ragged_runs_equal_a_loop_over_single_scores(sliding_window: int | None) -> None:
    """Three sequences, two runs of one, starts in the middle, values longer than keys, six heads on two."""
    sequences = Sequences([17, 9, 30], num_kv_heads=2, key_dim=6, value_dim=10)
    spans = [(0, 16, 17), (2, 20, 24), (1, 0, 9), (2, 3, 8)]
    query = random_query(6, sum(end - start for _, start, end in spans), 6)
    out, lse = paged_attention_reference(
        query,
        sequences.key_cache,
        sequences.value_cache,
        [RunTable(sequences.pages[index], start, end) for index, start, end in spans],
        PAGE_SIZE,
        0.7,
        sliding_window,
    )
    assert out.shape == (1, 19, 6, 10)
    tokens = [(index, position) for index, start, end in spans for position in range(start, end)]
    for token, (index, position) in enumerate(tokens):
        first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
        for head in range(6):
            weights = [
                math.exp(0.7 * float(query[0, head, token].double() @ sequences.keys[index][head // 3, seen].double()))
                for seen in range(first, position + 1)
            ]
            values = sequences.values[index][head // 3, first : position + 1].double()
            expected = torch.tensor(weights, dtype=torch.float64) @ values / sum(weights)
            torch.testing.assert_close(out[0, token, head].double(), expected, rtol=1e-5, atol=1e-5)
            assert float(lse[0, token, head]) == pytest.approx(math.log(sum(weights)), abs=1e-5)


def test_inputs_are_not_modified_and_output_has_their_dtype() -> None:
    sequences = Sequences([9], num_kv_heads=1, key_dim=4, value_dim=4)
    query = random_query(2, 9, 4).bfloat16()
    caches = sequences.key_cache.bfloat16(), sequences.value_cache.bfloat16()
    before = [tensor.clone() for tensor in (query, *caches)]
    out, lse = paged_attention_reference(query, *caches, [RunTable(sequences.pages[0], 0, 9)], PAGE_SIZE, 0.5, None)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert bool(out.isfinite().all())
    for tensor, copy in zip((query, *caches), before, strict=True):
        assert torch.equal(tensor.view(torch.int16), copy.view(torch.int16))


@pytest.mark.parametrize(
    ("run", "num_heads", "num_tokens", "sliding_window", "message"),
    [
        ((0, 9), 2, 9, None, "run [0, 9) does not fit its 2 pages of 4 slots"),
        ((3, 3), 2, 0, None, "run [3, 3) does not fit"),
        ((0, 8), 2, 7, None, "the runs have 8 tokens, query has 7"),
        ((0, 8), 3, 8, None, "3 query heads cannot share 2 key heads evenly"),
        ((0, 8), 2, 8, 0, "sliding_window must be at least 1 or None, got 0"),
    ],
)
def test_refuses_what_does_not_fit(
    run: tuple[int, int], num_heads: int, num_tokens: int, sliding_window: int | None, message: str
) -> None:
    cache = torch.zeros(8, 2, 4)
    query = torch.zeros(1, num_heads, num_tokens, 4)
    runs = [RunTable(np.array([1, 0], dtype=np.int32), *run)]
    with pytest.raises(ValueError, match=re.escape(message)):
        paged_attention_reference(query, cache, cache, runs, PAGE_SIZE, 1.0, sliding_window)


def test_float64_is_computed_in_float64() -> None:
    """Against one product of matrices; rounding to float32 anywhere would show."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(6, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    run = RunTable(np.array([1, 0], dtype=np.int32), 0, 6)
    slots = torch.tensor([4, 5, 6, 7, 0, 1])
    pool_keys, pool_values = (torch.full((8, 1, 8), torch.nan, dtype=torch.float64) for _ in range(2))
    pool_keys[slots, 0], pool_values[slots, 0] = keys, values
    out, lse = paged_attention_reference(query[None, None], pool_keys, pool_values, [run], 4, 0.3, None)
    scores = (query @ keys.T * 0.3).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    assert lse.dtype == torch.float64
    torch.testing.assert_close(out[0, :, 0], scores.softmax(1) @ values, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(lse[0, :, 0], scores.logsumexp(1), rtol=1e-14, atol=1e-14)
