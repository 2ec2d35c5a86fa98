"""The torch back end: no copies where the page table allows, shared pages attended once, no masks where possible.

A pass is cut into pieces (`planner`), each piece is one call of torch's flash attention (`pieces`), and partial
results of a row are merged by their log-sum-exp. A pass whose only piece is one causal block goes through the very
kernel that stock SDPA uses, so a cold full prefill is bit-identical to the stock forward on CPU. There, in float32 and
bfloat16, all short runs of a pass are one piece (`short_runs`), and one compiled loop merges (`merging`).
Sinks take their share of a row once, after its pieces are merged. Flash attention cannot cap scores: what it would
compute of a layer that does is two products with a softmax between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcomm.model import compiled
from kvcomm.model.attention import merging, short_runs
from kvcomm.model.attention.contract import AttentionStep, RunTable
from kvcomm.model.attention.merging import Merge, merge_by_loop, merge_into, weight_beside
from kvcomm.model.attention.pieces import Index, Piece, Scoring, TailPiece
from kvcomm.model.attention.planner import PassPlanner
from kvcomm.model.attention.short_runs import join_short_runs, joined_dtype


class TorchBackend:
    """SDPA over views of the pool; see the module docstring."""

    name = "torch"

    def __init__(self) -> None:
        self._keys: Sequence[Tensor] = ()
        self._values: Sequence[Tensor] = ()
        self._joined_dtype: torch.dtype | None = None
        self._merge: Merge = merge_into

    def prepare(
        self, runs: Sequence[RunTable], keys: Sequence[Tensor], values: Sequence[Tensor], page_size: int
    ) -> AttentionStep:
        if keys is not self._keys or values is not self._values:
            self._look_at(keys, values)
        return TorchStep(runs, keys, values, page_size, joined_dtype=self._joined_dtype, merge=self._merge)

    def _look_at(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Find out what may serve these storages, which all passes of a pool have in common."""
        self._keys, self._values, self._merge = keys, values, merge_into
        self._joined_dtype = joined_dtype((*keys, *values))
        if self._joined_dtype is not None:
            short_runs.compile_loop(self._joined_dtype)
            merging.compile_loop(self._joined_dtype)
            self._merge = merge_by_loop


class TorchStep:
    """One pass. Pieces are planned once per distinct window and reused by every layer with that window."""

    def __init__(
        self,
        runs: Sequence[RunTable],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        page_size: int,
        *,
        joined_dtype: torch.dtype | None,
        merge: Merge,
    ) -> None:
        self._keys, self._values = keys, values
        self._joined_dtype, self._merge = joined_dtype, merge
        self._planner = PassPlanner(runs, page_size, keys[0].device, joined_dtype=joined_dtype)
        self._write_slots = self._planner.write_slots()
        self._pieces: dict[int | None, list[Piece]] = {}

    def __call__(
        self,
        layer_id: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        keys, values = self._keys[layer_id], self._values[layer_id]
        _write(keys, self._write_slots, key)
        _write(values, self._write_slots, value)
        window = self._planner.effective_window(sliding_window)
        if window not in self._pieces:
            self._pieces[window] = self._plan(window)
        scoring = Scoring(scale, softcap, with_lse=sinks is not None)
        out, lse = _attend(self._pieces[window], query[0], keys, values, scoring, self._merge)
        if sinks is not None:
            assert lse is not None
            weights = weight_beside(lse, sinks[:, None])
            out = (out * weights[..., None]).to(out.dtype)
        return out.transpose(0, 1)[None]

    def _plan(self, window: int | None) -> list[Piece]:
        pieces = self._planner.pieces(window)
        if self._joined_dtype is None:
            return pieces
        compiled.share_threads()  # of the thread that makes the pass
        if any(isinstance(piece, TailPiece) for piece in pieces):
            pieces = join_short_runs(pieces, self._joined_dtype)
        return pieces


def _write(storage: Tensor, slots: Index, new: Tensor) -> None:
    """Put new [1, num_kv_heads, num_tokens, dim] into its slots of storage [num_slots, num_kv_heads, dim]."""
    if isinstance(slots, slice):
        storage[slots] = new[0].transpose(0, 1)
    else:
        storage.index_copy_(0, slots, new[0].transpose(0, 1))


def _attend(
    pieces: Sequence[Piece], query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, merge: Merge
) -> tuple[Tensor, Tensor | None]:
    """What `Piece.attend` gives, of all rows."""
    if len(pieces) == 1 and pieces[0].rows == slice(0, query.shape[1]):
        return pieces[0].attend(query, keys, values, scoring)
    num_heads, num_tokens, _ = query.shape
    rows_first = query.new_empty(num_tokens, num_heads, values.shape[-1])
    out = rows_first.transpose(0, 1)
    lse = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=query.device)
    for piece in pieces:
        part, part_lse = piece.attend(query, keys, values, scoring)
        if piece.merge:
            assert part_lse is not None
            merge(out, lse, piece.rows, part, part_lse)
        else:
            out[:, piece.rows] = part
            if part_lse is not None:
                lse[:, piece.rows] = part_lse
    return out, lse
