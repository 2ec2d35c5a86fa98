"""What a decoder computes between its products, in loops compiled by numba: norms, rotations, gates.

transformers makes a new tensor at each of several steps; here rows are read once and written once. Steps round where
those of transformers round, so that in bfloat16 results are the same but for the last bit of sums and exponentials.
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

Numbers = npt.NDArray[np.float32] | npt.NDArray[np.uint16]

ONE = np.float32(1)


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


norm = compiled.jit(_norm, parallel=True, fastmath={"contract", "reassoc"})
rotate = compiled.jit(_rotate, parallel=True)
gate = compiled.jit(_gate, parallel=True)
