"""The product of a linear layer with few rows where the weight is kept in 8 or 4 bits, compiled.

The weight is read from memory as it is kept, a quarter or an eighth of what float32 takes, and each number becomes a
float32 on its way to the sums; what comes out is the product with the dequantized weight, up to rounding. Importing
this file needs numba, see `compiled`.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from kvcomm.model import compiled

Floats = NDArray[np.float32]

GROUP = 32
"""Inputs that share a scale where the weight is kept in 4 bits."""

TILE = 16
"""Outputs that share the memory in which a weight is written out."""


def _sums_of_bytes(rows: Floats, codes: NDArray[np.int8], scales: Floats, out: Floats) -> None:
    """out[i, j] = scales[j] * sum of rows[i] * codes[j]: [num_rows, num_in], [num_out, num_in], [num_out]."""
    num_rows, num_in = rows.shape
    zero = np.float32(0)
    for j in numba.prange(codes.shape[0]):
        first = num_rows % 4
        for i in range(first):
            a = zero
            for k in range(num_in):
                a += np.float32(codes[j, k]) * rows[i, k]
            out[i, j] = a * scales[j]
        for i in range(first, num_rows, 4):
            a, b, c, d = zero, zero, zero, zero
            for k in range(num_in):
                w = np.float32(codes[j, k])
                a += w * rows[i, k]
                b += w * rows[i + 1, k]
                c += w * rows[i + 2, k]
                d += w * rows[i + 3, k]
            s = scales[j]
            out[i, j], out[i + 1, j], out[i + 2, j], out[i + 3, j] = a * s, b * s, c * s, d * s


def _sums_of_nibbles(rows: Floats, codes: NDArray[np.uint8], scales: Floats, lows: Floats, out: Floats) -> None:
    """rows [num_rows, num_in] times weights that are kept as `quantized.Nibbles`, to [num_rows, num_out].

    An output's weight is written out as float32 before it is multiplied: it stays in the nearest cache, and unpacking
    among the sums takes longer (measured, the layers of smollm2-135m and one row: 42 ms against 36, eight: 76 and 65).
    """
    num_rows, num_in = rows.shape
    num_out, half = codes.shape
    zero = np.float32(0)
    for tile in numba.prange((num_out + TILE - 1) // TILE):
        weight = np.empty(num_in, np.float32)
        for j in range(TILE * tile, min(TILE * (tile + 1), num_out)):
            # One step for a whole row each: loops that are long enough become vector instructions.
            for k in range(half):
                weight[k] = np.float32(np.int8(codes[j, k] & 15))
            for k in range(half):
                weight[half + k] = np.float32(np.int8(codes[j, k] >> 4))
            for g in range(scales.shape[1]):
                s, low = scales[j, g], lows[j, g]
                for k in range(GROUP * g, GROUP * (g + 1)):
                    weight[k] = weight[k] * s + low
            first = num_rows % 4
            for i in range(first):
                a = zero
                for k in range(num_in):
                    a += weight[k] * rows[i, k]
                out[i, j] = a
            for i in range(first, num_rows, 4):
                a, b, c, d = zero, zero, zero, zero
                for k in range(num_in):
                    w = weight[k]
                    a += w * rows[i, k]
                    b += w * rows[i + 1, k]
                    c += w * rows[i + 2, k]
                    d += w * rows[i + 3, k]
                out[i, j], out[i + 1, j], out[i + 2, j], out[i + 3, j] = a, b, c, d


# Sums may be reordered: else each is one long chain of additions.
sums_of_bytes = compiled.jit(_sums_of_bytes, parallel=True, fastmath={"contract", "reassoc"})
sums_of_nibbles = compiled.jit(_sums_of_nibbles, parallel=True, fastmath={"contract", "reassoc"})
