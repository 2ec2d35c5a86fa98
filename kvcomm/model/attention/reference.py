"""The equation of paged attention, for tests and benchmarks.

Float32 inside, or float64 where the query is; one loop over runs and one over heads, scores of a run as one matrix:
slow, short, and complete over the whole contract. It writes nothing to the caches: the new keys and values are
expected in their slots. It refuses what it does not support instead of guessing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcomm.model.attention.contract import RunTable


def paged_attention_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    runs: Sequence[RunTable],
    page_size: int,
    scale: float,
    sliding_window: int | None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of every run to its own page table.

    Source: Attention Is All You Need, arXiv:1706.03762v7, Sec. 3.2.1, eq. 1, with grouped heads
    (arXiv:2305.13245v3, Sec. 2.2). Deviation: `scale` is given, and a query at position p sees only the
    positions in (p - sliding_window, p].

    Args:
        query: [1, num_heads, num_tokens, key_dim], the concatenated tokens of the runs, any strides.
        key_cache: [num_slots, num_kv_heads, key_dim], any strides.
        value_cache: [num_slots, num_kv_heads, value_dim], any strides.
        runs: The runs, in the order of the tokens of `query`.
        page_size: Slots per page.
        scale: Factor on the dot products.
        sliding_window: Number of positions a query sees, itself included; None for all.
        softcap, sinks: See `AttentionStep`.

    Returns:
        Output [1, num_tokens, num_heads, value_dim] in the dtype of `query`, rounded once, and the natural
        logarithm of the softmax denominators, sinks included, [1, num_tokens, num_heads], float32 (float64 where
        `query` is). No
        input is modified; slots outside the page tables, and slots that no query sees, are never read.

    Raises:
        ValueError: Shapes, runs or window do not fit together; the message gives both numbers.
    """
    _check(query, key_cache, value_cache, runs, page_size, sliding_window)
    _, num_heads, num_tokens, _ = query.shape
    group_size = num_heads // key_cache.shape[1]
    out = query.new_zeros(1, num_tokens, num_heads, value_cache.shape[2])
    inside = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = torch.zeros(1, num_tokens, num_heads, dtype=inside, device=query.device)
    first_token = 0
    for run in runs:
        tokens = slice(first_token, first_token + run.end - run.start)
        first_token = tokens.stop
        positions = torch.arange(run.start, run.end, device=query.device)  # [num_run_tokens]
        first_seen = 0 if sliding_window is None else max(0, run.start - sliding_window + 1)
        seen = torch.arange(first_seen, run.end, device=query.device)  # [num_seen]
        pages = torch.as_tensor(run.pages, dtype=torch.int64, device=query.device)
        slots = pages[seen // page_size] * page_size + seen % page_size
        visible = seen <= positions[:, None]  # [num_run_tokens, num_seen]
        if sliding_window is not None:
            visible &= seen > positions[:, None] - sliding_window
        for head in range(num_heads):
            kv_head = head // group_size
            scores = query[0, head, tokens].to(inside) @ key_cache[slots, kv_head].to(inside).T * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~visible, -torch.inf)
            if sinks is not None:  # one more column, whose weight goes nowhere
                column = sinks[head].to(scores).expand(len(scores), 1)
                scores = torch.cat([scores, column], dim=1)
            lse[0, tokens, head] = torch.logsumexp(scores, dim=1)
            weights = torch.softmax(scores, dim=1)[:, : len(seen)]
            out[0, tokens, head] = (weights @ value_cache[slots, kv_head].to(inside)).to(query.dtype)
    return out, lse


def _check(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    runs: Sequence[RunTable],
    page_size: int,
    sliding_window: int | None,
) -> None:
    if query.dim() != 4 or query.shape[0] != 1:
        raise ValueError(f"query must be [1, num_heads, num_tokens, key_dim], got {tuple(query.shape)}")
    if key_cache.shape[:2] != value_cache.shape[:2] or key_cache.shape[2] != query.shape[3]:
        raise ValueError(
            f"keys {tuple(key_cache.shape)} and values {tuple(value_cache.shape)} do not fit each other "
            f"or query {tuple(query.shape)}"
        )
    if query.shape[1] % key_cache.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads cannot share {key_cache.shape[1]} key heads evenly")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 or None, got {sliding_window}")
    for run in runs:
        if not 0 <= run.start < run.end <= len(run.pages) * page_size:
            raise ValueError(
                f"run [{run.start}, {run.end}) does not fit its {len(run.pages)} pages of {page_size} slots"
            )
    num_run_tokens = sum(run.end - run.start for run in runs)
    if num_run_tokens != query.shape[2]:
        raise ValueError(f"the runs have {num_run_tokens} tokens, query has {query.shape[2]}")
