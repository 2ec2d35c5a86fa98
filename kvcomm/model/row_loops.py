"""What a decoder computes with rows, in loops compiled by numba: products of few rows, norms, rotations, gates.

A product of few rows costs what reading its weight from memory costs: here it is read once, whatever the rows. Between
products transformers makes a new tensor at each of several steps; here rows are read once and written once. Steps round
where those of transformers round, so that in bfloat16 results are the same but for the last bit of sums and
exponentials.

Arrays are float32, or bfloat16 by its bits, see `bits`. Importing this file needs numba, see `kvcomm.model.compiled`.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import numpy.typing as npt

from kvcomm.model import compiled
from kvcomm.model.attention.short_runs_loop import exp
from kvcomm.model.bits import rounded, widen

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.float32] | npt.NDArray[np.uint16]
"""Float32, or bfloat16 by its bits, see `bits`; sums are of float32 either way."""

ONE = np.float32(1)

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


def _norm(rows: Numbers, weight: Numbers, epsilon: np.float32, out: Numbers) -> None:
    """RMS norm of [num_rows, size] as transformers' LlamaRMSNorm: rounded before the weight is multiplied, and after.

    Source: arXiv 1910.07467, Sec. 3.
    """
    size = rows.shape[1]
    for i in numba.prange(len(rows)):
        total = np.float32(0)
        for k in range(size):
            number = widen(rows[i, k])
            total += number * number
        scale = ONE / np.float32(math.sqrt(total / np.float32(size) + epsilon))
        for k in range(size):
            scaled = widen(rounded(widen(rows[i, k]) * scale, out[0, 0]))
            out[i, k] = rounded(widen(weight[k]) * scaled, out[0, 0])


def _rotate(rows: Numbers, cos: Numbers, sin: Numbers, out: Numbers) -> None:
    """Rotate the heads of [num_rows, num_heads * dim] by [num_rows, dim] cosines and sines, halves of a head paired.

    Source: arXiv 2104.09864, Sec. 3.2.2, with a channel's partner half a head away.

    Args:
        rows: may be wider; what is behind the heads of `out` is left.
        out: [num_rows, num_heads * dim], of other memory.
    """
    dim = cos.shape[1]
    half = dim // 2
    num_heads = out.shape[1] // dim
    for i in numba.prange(len(out)):
        its_cos, its_sin = cos[i], sin[i]
        for head in range(num_heads):
            start, middle, end = head * dim, head * dim + half, (head + 1) * dim
            turn(rows[i, start:middle], rows[i, middle:end], its_cos[:half], its_sin[:half], out[i, start:middle], -ONE)
            turn(rows[i, middle:end], rows[i, start:middle], its_cos[half:], its_sin[half:], out[i, middle:end], ONE)


def _turn(rows: Numbers, partners: Numbers, cos: Numbers, sin: Numbers, out: Numbers, sign: np.float32) -> None:
    """out = rows * cos + sign * partners * sin, each step rounded."""
    for k in range(len(out)):
        one = widen(rounded(widen(rows[k]) * widen(cos[k]), out[0]))
        other = widen(rounded(sign * widen(partners[k]) * widen(sin[k]), out[0]))
        out[k] = rounded(one + other, out[0])


turn = compiled.jit(_turn)  # no steps taken together: each is rounded


def _gate_row(gates: Numbers, ups: Numbers) -> None:
    for k in range(len(gates)):
        gate = widen(gates[k])
        weight = exp(-abs(gate))
        sigmoid = (weight if gate < 0 else ONE) / (ONE + weight)
        opened = widen(rounded(gate * sigmoid, gates[0]))
        gates[k] = rounded(opened * widen(ups[k]), gates[0])


# A division by zero is no error here, as in numpy: looking for it takes numbers one at a time. A row by itself: written
# out in the parallel loop it takes twice the time (2.2 and 1.1 ms for 1,056 rows of 1,536).
gate_row = compiled.jit(_gate_row, error_model="numpy")


def _gate(gates: Numbers, ups: Numbers, out: Numbers) -> None:
    """out = silu(gates) * ups of [num_rows, size] each: the first and the last `size` columns of what is given.

    Gates and ups may be one array of [num_rows, 2 * size]; `out` is other memory, or the gates themselves.
    """
    size = out.shape[1]
    behind = ups.shape[1] - size
    is_in_place = out.ctypes.data == gates.ctypes.data
    for i in numba.prange(len(out)):
        if not is_in_place:
            out[i] = gates[i, :size]
        gate_row(out[i], ups[i, behind:])


# Sums may be reordered: else each is one long chain of additions.
sums_by_outputs = compiled.jit(_sums_by_outputs, parallel=True, fastmath={"contract", "reassoc"})
sums_by_tiles = compiled.jit(_sums_by_tiles, parallel=True, fastmath={"contract", "reassoc"})
norm = compiled.jit(_norm, parallel=True, fastmath={"contract", "reassoc"})
rotate = compiled.jit(_rotate, parallel=True)
gate = compiled.jit(_gate, parallel=True)
