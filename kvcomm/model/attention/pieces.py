"""Pieces: stretches of key slots together with the query rows that attend to them.

Each piece computes the attention of its rows over its own slots only and returns it with the log-sum-exp of the
scores, so that the partial results of a row can be merged (`merging`). No piece knows positions or windows: what a
row may see was decided when the pieces were planned. Slots and rows are read in place where they are consecutive, and
gathered where not.

Source: shared prefixes as in Hydragen, arXiv 2402.05099v2, Sec. 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Index = slice | Tensor
"""Rows or slots: a slice where they are consecutive (a view), else an int64 tensor (a gather)."""

SlotArray = npt.NDArray[np.int64]

MIN_VIEW_TOKENS = 256
"""Consecutive slots among scattered ones are read in place from this number on; fewer are gathered together."""

_flash_on_cpu: Callable[..., tuple[Tensor, Tensor]] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


MAX_GATHERED_TOKENS = 1024
"""A short run's slots that are not all consecutive are gathered up to this number, and beyond read where they are."""

MAX_SCORES = 2**24
"""That are held at once where attention is computed by products: 64 MB."""


def index_of(values: npt.NDArray[np.integer], device: torch.device) -> Index:
    """Rows or slots, at least one, as a slice if they are consecutive."""
    first = int(values[0])
    if (np.diff(values) == 1).all():
        return slice(first, first + len(values))
    return tensor_of(values, device)


def tensor_of(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """The array as a tensor on the device; on CPU they share their memory."""
    return torch.from_numpy(values).to(device)


def consecutive_parts(slots: SlotArray) -> list[tuple[int, int]]:
    """The parts of consecutive slots, in order, each as positions [start, end) in `slots`."""
    breaks = np.flatnonzero(np.diff(slots) != 1) + 1
    return list(pairwise([0, *breaks.tolist(), len(slots)]))


def views_and_gather(slots: SlotArray, device: torch.device) -> list[Index]:
    """Cover slots by views of their long consecutive parts and one gather of all the others."""
    parts = [slots[start:end] for start, end in consecutive_parts(slots)]
    if len(parts) == 1:
        return [index_of(slots, device)]
    scattered = [part for part in parts if len(part) < MIN_VIEW_TOKENS]
    views = [part for part in parts if len(part) >= MIN_VIEW_TOKENS]
    gathered = [np.concatenate(scattered)] if scattered else []
    return [index_of(part, device) for part in (*views, *gathered)]


class Scoring(NamedTuple):
    """How a layer scores keys, and what is asked of its pieces.

    Attributes:
        scale, softcap: see `AttentionStep`.
        with_lse: whether the log-sum-exp is needed of all rows, also of those that one piece serves alone.
    """

    scale: float
    softcap: float | None = None
    with_lse: bool = False


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

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
        """Attend with query [num_heads, num_tokens, key_dim] over storages [num_slots, num_kv_heads, dim].

        Returns:
            out [num_heads, num_rows, value_dim], dtype of query, and lse [num_heads, num_rows], float32, natural log;
            lse may be None if no other piece serves these rows and `scoring` does not ask for it.
        """
        ...


class Scratch:
    """Memory for intermediate results, the same for all pieces and layers of a pass, one after the other.

    For scores of a megabyte and more the system takes longer to hand out new memory than the scores take to compute.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, like: Tensor, *shape: int) -> Tensor:
        """Uninitialised, with dtype and device of `like`; valid until the next call."""
        num_elements = math.prod(shape)
        if self._memory is None or len(self._memory) < num_elements:
            self._memory = like.new_empty(num_elements)
        return self._memory[:num_elements].view(shape)


@dataclass(frozen=True)
class FullPiece:
    """Every row sees every slot. Group heads and rows are folded into one axis, so the slots are read once."""

    slots: Index
    rows: Index
    merge: bool

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
        key, value = _heads_first(keys, self.slots), _heads_first(values, self.slots)
        num_kv_heads = key.shape[1]
        rows = query[:, self.rows]
        num_heads, num_rows, key_dim = rows.shape
        folded = rows.reshape(1, num_kv_heads, num_heads // num_kv_heads * num_rows, key_dim)
        out, lse = attention_with_lse(folded, key, value, scoring)
        return out.reshape(num_heads, num_rows, -1), lse.reshape(num_heads, num_rows)


@dataclass(frozen=True)
class CausalPiece:
    """The diagonal of one run: row i sees the first i + 1 slots."""

    slots: Index
    rows: slice
    merge: bool

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
        key, value = _heads_first(keys, self.slots), _heads_first(values, self.slots)
        out, lse = attention_with_lse(query[None, :, self.rows], key, value, scoring, causal=True)
        return out[0], lse[0]


@dataclass(frozen=True)
class TailPiece:
    """All that a few rows see, a short run behind its prefix: row i sees the first num_slots - num_rows + 1 + i slots.

    One call of flash attention, the heads of a group folded into its rows under a mask made once for all layers. Slots
    that are not all consecutive are gathered for it. In float32 on CPU many of them are read where they are instead, by
    two products for each part with a softmax between them.
    """

    parts: tuple[Index, ...]
    rows: slice
    scratch: Scratch = field(compare=False)
    merge: bool = False
    masks: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, compare=False)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
        key_parts = [_heads_first(keys, part)[0] for part in self.parts]
        value_parts = [_heads_first(values, part)[0] for part in self.parts]
        num_slots = sum(part.shape[1] for part in key_parts)
        rows = query[:, self.rows]
        num_heads, num_rows, key_dim = rows.shape
        group = num_heads // keys.shape[1]
        folded = rows.reshape(keys.shape[1], group * num_rows, key_dim)
        is_plain = query.device.type == "cpu" and query.dtype == torch.float32
        is_plain = is_plain and scoring.softcap is None and not scoring.with_lse
        if is_plain and len(self.parts) > 1 and num_slots > MAX_GATHERED_TOKENS:
            return self._attend_parts(folded, key_parts, value_parts, scoring.scale).view(num_heads, num_rows, -1), None
        key, value = (parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in (key_parts, value_parts))
        mask = self._mask(group, num_rows, num_slots, rows)
        out, lse = attention_with_lse(folded[None], key[None], value[None], scoring, bias=mask)
        return out.reshape(num_heads, num_rows, -1), lse.reshape(num_heads, num_rows)

    def _attend_parts(
        self, folded: Tensor, key_parts: Sequence[Tensor], value_parts: Sequence[Tensor], scale: float
    ) -> Tensor:
        """[num_kv_heads, group * num_rows, value_dim] for folded [num_kv_heads, group * num_rows, key_dim]."""
        scores = self.scratch.take(folded, *folded.shape[:2], sum(part.shape[1] for part in key_parts))
        score_parts = scores.split([part.shape[1] for part in key_parts], -1)
        for score, key in zip(score_parts, key_parts, strict=True):
            torch.baddbmm(score, folded, key.mT, beta=0, alpha=scale, out=score)
        num_rows = self.rows.stop - self.rows.start
        diagonal = scores.view(-1, num_rows, scores.shape[-1])[..., -num_rows:]
        diagonal += torch.full((num_rows, num_rows), float("-inf")).triu_(1)
        torch.softmax(scores, -1, out=scores)
        out: Tensor = score_parts[0] @ value_parts[0]
        for weights, value in zip(score_parts[1:], value_parts[1:], strict=True):
            out.baddbmm_(weights, value)
        return out

    def _mask(self, group: int, num_rows: int, num_slots: int, like: Tensor) -> Tensor:
        """[group * num_rows, num_slots], added to the scores; the same for every layer with such groups."""
        key = (group, like.dtype)
        if key not in self.masks:
            visible = torch.ones(num_rows, num_slots, dtype=torch.bool, device=like.device).tril_(num_slots - num_rows)
            self.masks[key] = _additive(visible, like.dtype).repeat(group, 1)
        return self.masks[key]


@dataclass(frozen=True)
class MaskedPiece:
    """Row i sees the slots whose bit is set in row i of the mask (sliding windows)."""

    slots: Index
    rows: slice
    visible: Tensor  # [num_rows, num_slots] bool
    merge: bool = False

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
        key, value = _heads_first(keys, self.slots), _heads_first(values, self.slots)
        bias = _additive(self.visible, query.dtype)
        out, lse = attention_with_lse(query[None, :, self.rows], key, value, scoring, bias=bias)
        return out[0], lse[0]


@dataclass(frozen=True)
class StridedPiece:
    """One row each of many runs, every row over its own stretch; the stretches lie evenly spaced and are read in place.

    Row i sees the slots [first + i * stride, first + i * stride + num_slots).
    """

    first: int
    stride: int
    num_rows: int
    num_slots: int
    rows: Index
    merge: bool

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
        return _attend_one_row_each(query[:, self.rows], self._stretches(keys), self._stretches(values), scoring)

    def _stretches(self, stored: Tensor) -> Tensor:
        """[num_rows, num_kv_heads, num_slots, dim], a view."""
        per_slot, per_head, per_channel = stored.stride()
        return stored.as_strided(
            (self.num_rows, stored.shape[1], self.num_slots, stored.shape[2]),
            (self.stride * per_slot, per_head, per_slot, per_channel),
            stored.storage_offset() + self.first * per_slot,
        )


@dataclass(frozen=True)
class PaddedPiece:
    """One row each from many runs, every row over its own few slots: gathered into one padded batch."""

    slots: Tensor  # [num_rows, max_slots] int64; padding repeats a valid slot
    rows: Index
    visible: Tensor  # [num_rows, max_slots] bool
    merge: bool

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
        num_rows, max_slots = self.slots.shape
        flat = self.slots.flatten()
        key = keys.index_select(0, flat).view(num_rows, max_slots, *keys.shape[1:]).transpose(1, 2)
        value = values.index_select(0, flat).view(num_rows, max_slots, *values.shape[1:]).transpose(1, 2)
        bias = _additive(self.visible, query.dtype)[:, None, None]
        return _attend_one_row_each(query[:, self.rows], key, value, scoring, bias=bias)


def _attend_one_row_each(
    rows: Tensor, key: Tensor, value: Tensor, scoring: Scoring, *, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Row i of [num_heads, num_rows, key_dim] over entry i of [num_rows, num_kv_heads, num_slots, dim].

    Returns what `Piece.attend` does. The heads of a group are folded into the axis of rows.
    """
    num_heads, num_rows, _ = rows.shape
    num_kv_heads, num_slots = key.shape[1:3]
    folded = rows.transpose(0, 1).reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, -1)
    if bias is not None:
        bias = bias.expand(*folded.shape[:3], num_slots)
    out, lse = attention_with_lse(folded, key, value, scoring, bias=bias)
    return out.reshape(num_rows, num_heads, -1).transpose(0, 1), lse.reshape(num_rows, num_heads).transpose(0, 1)


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
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
    if query.device.type == "cpu" and key.shape[-1] == value.shape[-1] and scoring.softcap is None:
        # The kernel behind stock SDPA on CPU; it serves grouped heads itself.
        # Called directly, it silently misreads operands whose last axis is strided.
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        return _flash_on_cpu(query, key, value, 0.0, causal, attn_mask=bias, scale=scoring.scale)
    return _attention_by_matmul(query, key, value, scoring, causal=causal, bias=bias)


def _attention_by_matmul(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, *, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Block by block of rows, so that a long prompt's scores take little memory."""
    batch, num_heads, num_rows, _ = query.shape
    block = max(1, MAX_SCORES // (batch * num_heads * key.shape[2]))
    outs, lses = [], []
    for start in range(0, num_rows, block):
        rows = query[:, :, start : start + block]
        end = start + rows.shape[2]
        seen = end if causal else key.shape[2]
        scores = _scores(rows, key[:, :, :seen], scoring)
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(start + 1)
            scores.masked_fill_(hidden, float("-inf"))
        if bias is not None:
            scores += bias if bias.shape[-2] == 1 else bias[..., start:end, :]
        lse = scores.logsumexp(-1)
        weights = scores.sub_(lse[..., None]).exp_().to(value.dtype)
        folded = weights.view(batch, value.shape[1], -1, seen)
        outs.append((folded @ value[:, :, :seen]).view(*weights.shape[:3], -1))
        lses.append(lse)
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 2), torch.cat(lses, 2))


def _scores(query: Tensor, key: Tensor, scoring: Scoring) -> Tensor:
    """[batch, num_heads, num_rows, num_slots] float32; heads of a group and rows are one axis of the product."""
    batch, num_heads, num_rows, key_dim = query.shape
    folded = query.reshape(batch, key.shape[1], num_heads // key.shape[1] * num_rows, key_dim)
    scores = (folded @ key.mT).float().mul_(scoring.scale).view(batch, num_heads, num_rows, -1)
    cap = scoring.softcap
    return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)


def _heads_first(stored: Tensor, slots: Index) -> Tensor:
    """Slots of [num_slots, num_kv_heads, dim] as [1, num_kv_heads, len(slots), dim]; a view where they are a slice."""
    # index_select costs half of what indexing by a tensor does.
    chosen = stored[slots] if isinstance(slots, slice) else stored.index_select(0, slots)
    return chosen.transpose(0, 1)[None]


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
