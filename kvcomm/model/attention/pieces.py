"""Pieces: stretches of key slots together with the query rows that attend to them.

Each piece computes the attention of its rows over its own slots only and returns it with the log-sum-exp of the
scores, so that the partial results of a row can be merged (`merge_into`). No piece knows positions or windows: what a
row may see was decided when the pieces were planned.

Source of the merge: FlashAttention-2, arXiv 2307.08691v1, Sec. 2.3; shared prefixes as in Hydragen, arXiv
2402.05099v2, Sec. 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Index = slice | Tensor
"""Rows or slots: a slice where they are consecutive (a view), else an int64 tensor (a gather)."""


class Piece(Protocol):
    """A part of a pass: which rows it serves, and how."""

    @property
    def rows(self) -> Index:
        """Query rows of the pass, in the order of the returned partial result."""
        ...

    @property
    def merge(self) -> bool:
        """Whether the rows already hold a partial result."""
        ...

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attend with query [num_heads, num_tokens, key_dim] over storages [num_slots, num_kv_heads, dim].

        Returns:
            out [num_heads, num_rows, value_dim], dtype of query, and lse [num_heads, num_rows], float32, natural log.
        """
        ...


@dataclass(frozen=True)
class FullPiece:
    """Every row sees every slot. Group heads and rows are folded into one axis, so the slots are read once."""

    slots: Index
    rows: Index
    merge: bool

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        key, value = _heads_first(keys, self.slots), _heads_first(values, self.slots)
        num_kv_heads = key.shape[1]
        rows = query[:, self.rows]
        num_heads, num_rows, key_dim = rows.shape
        folded = rows.reshape(1, num_kv_heads, num_heads // num_kv_heads * num_rows, key_dim)
        out, lse = attention_with_lse(folded, key, value, scale)
        return out.reshape(num_heads, num_rows, -1), lse.reshape(num_heads, num_rows)


@dataclass(frozen=True)
class CausalPiece:
    """The diagonal of one run: row i sees the first i + 1 slots."""

    slots: Index
    rows: slice
    merge: bool

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        key, value = _heads_first(keys, self.slots), _heads_first(values, self.slots)
        out, lse = attention_with_lse(query[None, :, self.rows], key, value, scale, causal=True)
        return out[0], lse[0]


@dataclass(frozen=True)
class MaskedPiece:
    """Row i sees the slots whose bit is set in row i of the mask (sliding windows)."""

    slots: Index
    rows: slice
    visible: Tensor  # [num_rows, num_slots] bool
    merge: bool = False

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        key, value = _heads_first(keys, self.slots), _heads_first(values, self.slots)
        bias = _additive(self.visible, query.dtype)
        out, lse = attention_with_lse(query[None, :, self.rows], key, value, scale, bias=bias)
        return out[0], lse[0]


@dataclass(frozen=True)
class PaddedPiece:
    """One row each from many runs, every row over its own few slots: gathered into one padded batch."""

    slots: Tensor  # [num_rows, max_slots] int64; padding repeats a valid slot
    rows: Index
    visible: Tensor  # [num_rows, max_slots] bool
    merge: bool

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        num_rows, max_slots = self.slots.shape
        flat = self.slots.flatten()
        key = keys.index_select(0, flat).view(num_rows, max_slots, *keys.shape[1:]).transpose(1, 2)
        value = values.index_select(0, flat).view(num_rows, max_slots, *values.shape[1:]).transpose(1, 2)
        num_kv_heads = key.shape[1]
        rows = query[:, self.rows].transpose(0, 1)  # [num_rows, num_heads, key_dim]
        group = rows.shape[1] // num_kv_heads
        folded = rows.reshape(num_rows, num_kv_heads, group, -1)
        bias = _additive(self.visible, query.dtype)[:, None, None].expand(-1, num_kv_heads, group, -1)
        out, lse = attention_with_lse(folded, key, value, scale, bias=bias)
        return out.reshape(num_rows, num_kv_heads * group, -1).transpose(0, 1), lse.flatten(1).transpose(0, 1)


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a batch with the log-sum-exp of its scores.

    Args:
        query: [batch, num_heads, num_rows, key_dim]; num_heads a multiple of num_kv_heads.
        key, value: [batch, num_kv_heads, num_slots, dim], any strides with unit stride on the last axis.
        causal: row i sees the first i + 1 slots; needs num_rows == num_slots.
        bias: added to the scores, broadcastable to [batch, num_heads, num_rows, num_slots].

    Returns:
        out [batch, num_heads, num_rows, value_dim], dtype of query; lse [batch, num_heads, num_rows], float32.
    """
    if query.device.type == "cpu" and key.shape[-1] == value.shape[-1]:
        # The kernel behind stock SDPA on CPU; it serves grouped heads itself.
        # Called directly, it silently misreads operands whose last axis is strided.
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        flash: Callable[..., tuple[Tensor, Tensor]] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
    return _attention_by_matmul(query, key, value, scale, causal=causal, bias=bias)


def _attention_by_matmul(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().to(value.dtype)
    return weights @ value, lse


def merge_into(out: Tensor, lse: Tensor, rows: Index, part: Tensor, part_lse: Tensor) -> None:
    """Merge a partial result into rows of `out` [num_heads, num_tokens, value_dim] and `lse`; both are changed."""
    old, old_lse = out[:, rows], lse[:, rows]
    total = torch.logaddexp(old_lse, part_lse)
    old_weight, part_weight = (old_lse - total).exp()[..., None], (part_lse - total).exp()[..., None]
    out[:, rows] = (old * old_weight + part * part_weight).to(out.dtype)
    lse[:, rows] = total


def _heads_first(stored: Tensor, slots: Index) -> Tensor:
    """Slots of [num_slots, num_kv_heads, dim] as [1, num_kv_heads, len(slots), dim]; a view where they are a slice."""
    # index_select costs half of what indexing by a tensor does.
    chosen = stored[slots] if isinstance(slots, slice) else stored.index_select(0, slots)
    return chosen.transpose(0, 1)[None]


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
