"""Merging partial results of attention by their log-sum-exp: in steps of torch, or in one compiled loop.

Source of the merge: FlashAttention-2, arXiv 2307.08691v1, Sec. 2.3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from kvcomm.model import compiled
from kvcomm.model.attention.pieces import Index

Merge = Callable[[Tensor, Tensor, Index, Tensor, Tensor], None]


def merge_into(out: Tensor, lse: Tensor, rows: Index, part: Tensor, part_lse: Tensor) -> None:
    """Merge a partial result into rows of `out` [num_heads, num_tokens, value_dim] and `lse`; both are changed."""
    old, old_lse = out[:, rows], lse[:, rows]
    total = torch.logaddexp(old_lse, part_lse)
    old_weight, part_weight = (old_lse - total).exp()[..., None], (part_lse - total).exp()[..., None]
    out[:, rows] = (old * old_weight + part * part_weight).to(out.dtype)
    lse[:, rows] = total


def weight_beside(lse: Tensor, sinks: Tensor) -> Tensor:
    """The weight that rows keep once their softmax's sum holds a sink as well, in the shape of `lse`, float32.

    Attention over keys and a sink is attention over the keys alone times exp(lse) / (exp(lse) + exp(sink)). So a sink
    counts once for a row, in however many pieces its keys were attended.

    Args:
        lse: log-sum-exp of the scores of all keys that a row sees.
        sinks: broadcast to it.
    """
    return torch.sigmoid(lse - sinks.float())


def merge_by_loop(out: Tensor, lse: Tensor, rows: Index, part: Tensor, part_lse: Tensor) -> None:
    """`merge_into` for float32 and bfloat16 on CPU, without the intermediate results it writes for every step.

    Args:
        out: its rows one after the other in memory, as [num_tokens, num_heads, value_dim] transposed.
        lse: contiguous.
    """
    from kvcomm.model.attention.merging_loop import merge

    row_ids = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.numpy()
    part = part if part.stride(-1) == 1 else part.contiguous()
    (part_per_head, part_per_row, _), (lse_per_head, lse_per_row) = part.stride(), part_lse.stride()
    rows_first, its_lse = compiled.numbers(out.transpose(0, 1)), lse.numpy()
    flat, flat_lse = _flat(part), _flat(part_lse)
    with compiled.one_caller:
        merge(rows_first, its_lse, row_ids, flat, part_per_head, part_per_row, flat_lse, lse_per_head, lse_per_row)


@cache
def compile_loop(dtype: torch.dtype) -> None:
    """Compile or load the loop, so that no pass that serves waits for it."""
    with torch.inference_mode(), compiled.threads():
        one, its_lse = torch.zeros(1, 1, 1, dtype=dtype), torch.zeros(1, 1)
        merge_by_loop(one, its_lse, slice(0, 1), one.clone(), its_lse.clone())


def _flat(values: Tensor) -> np.ndarray:
    """The memory from a tensor's first number to its last, so that the loop knows that numbers are neighbours."""
    num = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True))
    return compiled.numbers(values.as_strided((num,), (1,)))
