"""The product of a linear layer with few rows, compiled: the weight is read from memory once, whatever the rows.

That is what such a product costs. Importing this file needs numba, see `compiled`.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from kvcomm.model import compiled
from kvcomm.model.bits import rounded, widen

Floats = NDArray[np.float32]
Numbers = NDArray[np.float32] | NDArray[np.uint16]
"""Float32, or bfloat16 by its bits, see `bits`; sums are of float32 either way."""

TILE = 4
"""Outputs that are computed together by `sums_by_tiles`."""


def _sums_by_outputs(rows: Floats, weight: Numbers, out: Numbers) -> None:
    """out[i, j] = sum of rows[i] * weight[j]: [num_rows, num_in], [num_out, num_in] -> [num_rows, num_out].

    One output after the other, for four rows at a time: each thread reads its part of the weight from one end to the
    other, as memory likes it. For as many rows as stay in the nearest cache.
    """
    num_rows, num_in = rows.shape
    zero, like = np.float32(0), out[0, 0]
    for j in numba.prange(weight.shape[0]):
        first = num_rows % 4
        for i in range(first):
            a = zero
            for k in range(num_in):
                a += widen(weight[j, k]) * rows[i, k]
            out[i, j] = rounded(a, like)
        for i in range(first, num_rows, 4):
            a, b, c, d = zero, zero, zero, zero
            for k in range(num_in):
                w = widen(weight[j, k])
                a += w * rows[i, k]
                b += w * rows[i + 1, k]
                c += w * rows[i + 2, k]
                d += w * rows[i + 3, k]
            out[i, j], out[i + 1, j] = rounded(a, like), rounded(b, like)
            out[i + 2, j], out[i + 3, j] = rounded(c, like), rounded(d, like)


def _sums_by_tiles(rows: Floats, weight: Floats, out: Floats) -> None:
    """The same in float32, four outputs and two rows at a time: eight sums, and every number read serves several."""
    num_rows, num_in = rows.shape
    num_out = weight.shape[0]
    zero = np.float32(0)
    for tile in numba.prange((num_out + TILE - 1) // TILE):
        # The last tile may lie over the one before: both write the same numbers there.
        a = max(min(TILE * tile, num_out - TILE), 0)
        b, c, d = min(a + 1, num_out - 1), min(a + 2, num_out - 1), min(a + 3, num_out - 1)
        for i in range(0, num_rows - 1, 2):
            a0, b0, c0, d0 = zero, zero, zero, zero
            a1, b1, c1, d1 = zero, zero, zero, zero
            for k in range(num_in):
                x0, x1 = rows[i, k], rows[i + 1, k]
                a0 += weight[a, k] * x0
                b0 += weight[b, k] * x0
                c0 += weight[c, k] * x0
                d0 += weight[d, k] * x0
                a1 += weight[a, k] * x1
                b1 += weight[b, k] * x1
                c1 += weight[c, k] * x1
                d1 += weight[d, k] * x1
            out[i, a], out[i, b], out[i, c], out[i, d] = a0, b0, c0, d0
            out[i + 1, a], out[i + 1, b], out[i + 1, c], out[i + 1, d] = a1, b1, c1, d1
        if num_rows % 2:
            i = num_rows - 1
            a0, b0, c0, d0 = zero, zero, zero, zero
            for k in range(num_in):
                x0 = rows[i, k]
                a0 += weight[a, k] * x0
                b0 += weight[b, k] * x0
                c0 += weight[c, k] * x0
                d0 += weight[d, k] * x0
            out[i, a], out[i, b], out[i, c], out[i, d] = a0, b0, c0, d0


# Sums may be reordered: else each is one long chain of additions.
sums_by_outputs = compiled.jit(_sums_by_outputs, parallel=True, fastmath={"contract", "reassoc"})
sums_by_tiles = compiled.jit(_sums_by_tiles, parallel=True, fastmath={"contract", "reassoc"})
