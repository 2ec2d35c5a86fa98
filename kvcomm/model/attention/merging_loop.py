"""The loop of `merging`, compiled by numba. Importing this file needs it, see `kvcomm.model.compiled`."""

from __future__ import annotations

import math

import numba
import numpy as np
import numpy.typing as npt

from kvcomm.model import compiled
from kvcomm.model.bits import rounded, widen

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float32] | npt.NDArray[np.uint16]
"""Float32, or bfloat16 by its bits."""


def _merge(
    out: Numbers,
    lse: Floats,
    rows: Ints,
    part: Numbers,
    part_per_head: int,
    part_per_row: int,
    part_lse: Floats,
    lse_per_head: int,
    lse_per_row: int,
) -> None:
    """Merge a partial result of some rows into all.

    Args:
        out: [num_tokens, num_heads, value_dim]; changed.
        lse: [num_heads, num_tokens]; changed.
        rows: [num_rows] int64, where each row of the partial result belongs.
        part, part_lse: memory in which head h of row i begins at h * per_head + i * per_row.
    """
    num_heads, dim = out.shape[1:]
    for i in numba.prange(len(rows)):
        row = rows[i]
        for h in range(num_heads):
            old, new = lse[h, row], part_lse[h * lse_per_head + i * lse_per_row]
            top = max(old, new)
            old_weight, new_weight = math.exp(old - top), math.exp(new - top)
            total = old_weight + new_weight
            old_weight /= total
            new_weight /= total
            lse[h, row] = top + math.log(total)
            start = h * part_per_head + i * part_per_row
            mine, theirs = out[row, h], part[start : start + dim]
            for k in range(dim):
                mine[k] = rounded(widen(mine[k]) * old_weight + widen(theirs[k]) * new_weight, mine[0])


merge = compiled.jit(_merge, parallel=True, fastmath={"contract"})
