"""The loop of `short_runs`, compiled by numba. Importing this file needs it, see `kvcomm.model.compiled`.

Scores, softmax and the sum of values, as in any attention; an item of the loop is what some rows of one run see through
one head of keys and values. Slots are taken block by block, so that what is read of them stays in the nearest cache
while all rows of the item use it.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import numpy.typing as npt

from kvcomm.model import compiled
from kvcomm.model.bits import float_of_bits, prefetch, rounded, widen

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float32] | npt.NDArray[np.uint16]
"""Float32, or bfloat16 by its bits."""

BLOCK = 64
"""Slots that all rows of an item look at before the next ones."""

ANY_ORDER = {"contract", "reassoc", "nsz"}
"""Of sums: else each is one long chain of additions. Infinities and NaN stay what they are."""

ZERO, ONE = np.float32(0), np.float32(1)


def _exp(x: np.float32) -> np.float32:
    """e to the power of x <= 0, within two units of the last place; below -87 it is e to the power of -87, not 0.

    Two to the power of n times a polynomial (Cephes, expf.c): unlike a call of the system's function it is computed
    for eight numbers at once.
    """
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    rest = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * rest + np.float32(1.3981999507e-3)
    y = y * rest + np.float32(8.3334519073e-3)
    y = y * rest + np.float32(4.1665795894e-2)
    y = y * rest + np.float32(1.6666665459e-1)
    y = y * rest + np.float32(5.0000001201e-1)
    y = y * rest * rest + rest + ONE
    return np.float32(y * float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23)))


# In this order: the two steps that take n off x lose nothing only one after the other.
exp = compiled.jit(_exp, fastmath={"contract"})


LINE = 64
"""Bytes that memory hands out at once."""

AHEAD = 48
"""Slots between the one that is read and the one that is asked for."""


def _ask_for(stored: Numbers, head: int, slot: int) -> None:
    """Have stored[slot, head] on its way: slots of a head are too far apart for the processor to foresee them."""
    per_slot, per_head, per_channel = stored.strides
    first = stored.ctypes.data + head * per_head + slot * per_slot
    for offset in range(0, stored.shape[2] * per_channel, LINE):
        prefetch(first + offset)


ask_for = compiled.jit(_ask_for)


def _score_block(rows: Floats, keys: Numbers, head: int, slots: Ints, start: int, end: int, scores: Floats) -> None:
    """scores[f, s] = rows[f] . keys[slots[s], head] for s in [start, end); up to four rows read a key at once."""
    num_rows, dim = rows.shape
    last = len(slots) - 1
    for f in range(0, num_rows, 4):
        num_here = min(4, num_rows - f)
        for s in range(start, end):
            slot = slots[s]
            if f == 0:
                ask_for(keys, head, slots[min(s + AHEAD, last)])
            a, b, c, d = ZERO, ZERO, ZERO, ZERO
            if num_here == 4:
                for k in range(dim):
                    key = widen(keys[slot, head, k])
                    a += key * rows[f, k]
                    b += key * rows[f + 1, k]
                    c += key * rows[f + 2, k]
                    d += key * rows[f + 3, k]
                scores[f, s], scores[f + 1, s], scores[f + 2, s], scores[f + 3, s] = a, b, c, d
            elif num_here == 3:
                for k in range(dim):
                    key = widen(keys[slot, head, k])
                    a += key * rows[f, k]
                    b += key * rows[f + 1, k]
                    c += key * rows[f + 2, k]
                scores[f, s], scores[f + 1, s], scores[f + 2, s] = a, b, c
            else:
                for g in range(f, f + num_here):
                    a = ZERO
                    for k in range(dim):
                        a += widen(keys[slot, head, k]) * rows[g, k]
                    scores[g, s] = a


score_block = compiled.jit(_score_block, fastmath=ANY_ORDER)


def _weigh(scores: Floats, num_seen: int, scale: np.float32, softcap: np.float32) -> tuple[np.float32, np.float32]:
    """Turn a row's products into weights that are yet to be divided by their sum.

    Returns:
        The sum, and the largest score.
    """
    if softcap > ZERO:
        for s in range(num_seen):
            scores[s] = softcap * np.float32(math.tanh(scores[s] * scale / softcap))
        scale = ONE
    top = scores[0] * scale
    for s in range(num_seen):
        scores[s] *= scale
        top = max(top, scores[s])
    total = ZERO
    for s in range(num_seen):
        weight = exp(scores[s] - top)
        scores[s] = weight
        total += weight
    for s in range(num_seen, len(scores)):
        scores[s] = ZERO
    return np.float32(total), np.float32(top)


weigh = compiled.jit(_weigh, fastmath=ANY_ORDER)


def _add_block(weights: Floats, values: Numbers, head: int, slots: Ints, start: int, end: int, sums: Floats) -> None:
    """sums[f] += weights[f, s] * values[slots[s], head] for s in [start, end), four slots at a time."""
    num_rows, dim = sums.shape
    whole = end - (end - start) % 4
    for s in range(start, whole, 4):
        first, second, third, fourth = slots[s], slots[s + 1], slots[s + 2], slots[s + 3]
        for ahead in range(s + AHEAD, min(s + AHEAD + 4, len(slots))):
            ask_for(values, head, slots[ahead])
        for f in range(num_rows):
            a, b, c, d = weights[f, s], weights[f, s + 1], weights[f, s + 2], weights[f, s + 3]
            for k in range(dim):
                sums[f, k] += (
                    a * widen(values[first, head, k])
                    + b * widen(values[second, head, k])
                    + c * widen(values[third, head, k])
                    + d * widen(values[fourth, head, k])
                )
    for s in range(whole, end):
        slot = slots[s]
        for f in range(num_rows):
            a = weights[f, s]
            for k in range(dim):
                sums[f, k] += a * widen(values[slot, head, k])


add_block = compiled.jit(_add_block, fastmath=ANY_ORDER)


def _attend(
    query: Floats,
    keys: Floats,
    values: Floats,
    runs: Ints,
    slots: Ints,
    num_parts: int,
    scale: np.float32,
    softcap: np.float32,
    rows: Floats,
    scores: Floats,
    sums: Floats,
    out: Floats,
    lse: Floats,
) -> None:
    """Attention of `ShortRunsPiece`.

    Args:
        query, out: [num_rows, num_heads, dim].
        keys, values: [num_slots, num_kv_heads, dim].
        num_parts: parts into which the rows of a group's heads are cut.
        softcap: of the scores; 0: none.
        rows, scores, sums: see `Buffers`.
        lse: [num_rows, num_heads], log-sum-exp of the scores.
    """
    num_kv_heads = keys.shape[1]
    group = query.shape[1] // num_kv_heads
    for index in numba.prange(len(runs) * num_kv_heads * num_parts):
        item = np.int64(index)
        part, head, run = item % num_parts, item // num_parts % num_kv_heads, item // num_parts // num_kv_heads
        first_row, num_rows, first_slot, num_slots = runs[run]
        folded = group * num_rows  # heads of a group and rows as one axis
        per_part = (folded + num_parts - 1) // num_parts
        start = min(part * per_part, folded)
        count = min(per_part, folded - start)
        for f in range(count):
            row, its_head = first_row + (start + f) % num_rows, head * group + (start + f) // num_rows
            for k in range(rows.shape[2]):
                rows[item, f, k] = widen(query[row, its_head, k])
            for k in range(sums.shape[2]):
                sums[item, f, k] = ZERO
        seen = slots[first_slot : first_slot + num_slots]
        for s in range(0, num_slots, BLOCK):
            block_end = min(s + BLOCK, num_slots)
            score_block(rows[item, :count], keys, head, seen, s, block_end, scores[item, :count])
        for f in range(count):
            num_seen = num_slots - num_rows + 1 + (start + f) % num_rows
            total, top = weigh(scores[item, f, :num_slots], num_seen, scale, softcap)
            # A row is read no more once it has its scores; its first number becomes the sum of its weights.
            rows[item, f, 0] = total
            row, its_head = first_row + (start + f) % num_rows, head * group + (start + f) // num_rows
            lse[row, its_head] = top + math.log(total)
        for s in range(0, num_slots, BLOCK):
            block_end = min(s + BLOCK, num_slots)
            add_block(scores[item, :count], values, head, seen, s, block_end, sums[item, :count])
        for f in range(count):
            row, its_head = first_row + (start + f) % num_rows, head * group + (start + f) // num_rows
            factor = ONE / rows[item, f, 0]
            for k in range(sums.shape[2]):
                out[row, its_head, k] = rounded(sums[item, f, k] * factor, out[0, 0, 0])


attend = compiled.jit(_attend, parallel=True, fastmath=ANY_ORDER)
