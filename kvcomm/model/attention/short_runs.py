"""Attention of all short runs of a pass in one call, on the CPU in float32 or bfloat16.

Answers that are decoded with guesses are runs of a few rows, each behind a prefix of its own. A call of flash attention
for each of them spends most of its time on being started and, where slots are not consecutive, on gathering them. One
compiled loop over all runs reads slots where they are. For more rows or longer prefixes flash attention is ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcomm.model import compiled
from kvcomm.model.attention.pieces import Index, Piece, Scoring, SlotArray, TailPiece, index_of
from kvcomm.model.compiled import numbers

MAX_ROWS = {torch.float32: 8, torch.bfloat16: 1}
"""Of a run that joins, by dtype of keys and values: of bfloat16 flash attention multiplies several rows by tiles."""

MAX_SLOTS = 1024
"""That the last row of such a run sees."""

MAX_SLOTS_OF_ONE_ROW = 2048
"""That a run of one row sees: reading them is all its work, so the loop is ahead for longer."""

Floats = npt.NDArray[np.float32]


class Buffers(NamedTuple):
    """Memory of the loop, for each of its items; contents are nobody's but the loop's.

    Attributes:
        rows: [num_items, rows_per_item, key_dim].
        scores: [num_items, rows_per_item, max_slots].
        sums: [num_items, rows_per_item, value_dim].
    """

    rows: Floats
    scores: Floats
    sums: Floats


@dataclass(frozen=True)
class ShortRunsPiece:
    """Row i of each run sees the first num_slots - num_rows + 1 + i of the run's slots.

    Attributes:
        rows: the runs' rows, run after run.
        runs: [num_runs, 4] int64: first row (counted within `rows`), number of rows, first of its entries in `slots`,
            number of slots.
        slots: what the runs' last rows see, run after run.
    """

    rows: Index
    runs: npt.NDArray[np.int64]
    slots: SlotArray
    merge: bool = False
    buffers: dict[tuple[int, ...], Buffers] = field(default_factory=dict, compare=False)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
        from kvcomm.model.attention.short_runs_loop import attend

        rows = numbers(query[:, self.rows].transpose(0, 1).contiguous())
        num_kv_heads = keys.shape[1]
        num_parts = self._num_parts(num_kv_heads)
        buffers = self._buffers(num_kv_heads, num_parts, rows.shape[1], rows.shape[2], values.shape[2])
        out = query.new_empty(*rows.shape[:2], values.shape[2])
        lse = torch.empty(rows.shape[:2])
        with compiled.one_caller:
            attend(
                rows,
                numbers(keys),
                numbers(values),
                self.runs,
                self.slots,
                num_parts,
                np.float32(scoring.scale),
                np.float32(scoring.softcap or 0),
                *buffers,
                numbers(out),
                lse.numpy(),
            )
        return out.transpose(0, 1), lse.T

    def _num_parts(self, num_kv_heads: int) -> int:
        """Parts into which the rows over one head of keys are cut, so that all threads have work to the end."""
        num_threads = torch.get_num_threads()
        return 1 if num_threads == 1 or len(self.runs) * num_kv_heads >= 4 * num_threads else 2

    def _buffers(self, num_kv_heads: int, num_parts: int, num_heads: int, key_dim: int, value_dim: int) -> Buffers:
        key = (num_kv_heads, num_parts, num_heads, key_dim, value_dim)
        if key not in self.buffers:
            num_items = len(self.runs) * num_kv_heads * num_parts
            most_rows, most_slots = int(self.runs[:, 1].max()), int(self.runs[:, 3].max())
            per_item = -(-most_rows * (num_heads // num_kv_heads) // num_parts)
            sizes = (key_dim, most_slots, value_dim)
            self.buffers[key] = Buffers(*(np.empty((num_items, per_item, size), np.float32) for size in sizes))
        return self.buffers[key]


def can_join(storage: Tensor) -> bool:
    """Whether the loop can read keys or values stored like this."""
    return storage.device.type == "cpu" and storage.dtype in MAX_ROWS and storage.is_contiguous()


def joined_dtype(storages: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype of keys and values of all layers, where their short runs can be joined; None: they cannot."""
    is_one = len({storage.dtype for storage in storages}) == 1
    return storages[0].dtype if is_one and all(map(can_join, storages)) else None


def is_short(num_rows: int, num_slots: int, dtype: torch.dtype) -> bool:
    """Whether a run of so many rows, the last of which sees so many slots, may join others."""
    return num_rows <= MAX_ROWS[dtype] and num_slots <= (MAX_SLOTS_OF_ONE_ROW if num_rows == 1 else MAX_SLOTS)


def join_short_runs(pieces: Sequence[Piece], dtype: torch.dtype = torch.float32) -> list[Piece]:
    """The pieces of a pass over storages that `can_join`, with those of short runs as one where that pays.

    The loop runs on the threads that the caller has given it, see `compiled.share_threads`.
    """
    short = [piece for piece in pieces if isinstance(piece, TailPiece) and _is_short(piece, dtype)]
    if len(short) < 2 and not any(len(piece.parts) > 1 for piece in short):
        return list(pieces)
    others = [piece for piece in pieces if not any(piece is one for one in short)]
    return [_joined(short), *others]


@cache
def compile_loop(dtype: torch.dtype = torch.float32) -> None:
    """Compile or load the loop: for the first pass of all, which measures a model, so that none that serves waits."""
    with torch.inference_mode(), compiled.threads():
        one = torch.zeros(1, 1, 1, dtype=dtype)
        ShortRunsPiece(slice(0, 1), np.array([[0, 1, 0, 1]]), np.zeros(1, np.int64)).attend(one, one, one, Scoring(1.0))


def _is_short(piece: TailPiece, dtype: torch.dtype) -> bool:
    return is_short(piece.rows.stop - piece.rows.start, sum(_length(part) for part in piece.parts), dtype)


def _joined(pieces: Sequence[TailPiece]) -> ShortRunsPiece:
    slots = [np.concatenate([_values(part) for part in piece.parts]) for piece in pieces]
    num_rows = [piece.rows.stop - piece.rows.start for piece in pieces]
    num_slots = [len(each) for each in slots]
    runs = np.stack([_starts(num_rows), num_rows, _starts(num_slots), num_slots], axis=1)
    rows = np.concatenate([np.arange(piece.rows.start, piece.rows.stop) for piece in pieces])
    return ShortRunsPiece(index_of(rows, torch.device("cpu")), runs, np.concatenate(slots))


def _starts(lengths: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.cumsum([0, *lengths[:-1]], dtype=np.int64)


def _length(index: Index) -> int:
    return index.stop - index.start if isinstance(index, slice) else len(index)


def _values(index: Index) -> SlotArray:
    return np.arange(index.start, index.stop) if isinstance(index, slice) else index.numpy()
