"""Products of linear layers in bfloat16 by tiles: weights are read where they lie, once, whatever the rows up to 32.

Other libraries pack weights for tiles, in every call or once and for all, which doubles them. Here a tile of the weight
is the left factor, whose rows may lie anywhere, and the few numbers of the rows are packed instead. Each output is one
sum in float32, of its products in order, two by two, and is rounded once: the same for a row whatever rows come with
it.

Importing this file needs numba and running it tiles, see `tiles`.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from kvcomm.model import compiled, tiles
from kvcomm.model.bits import prefetch

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

SIDE = tiles.SIDE
BLOCK = 2 * SIDE
"""Outputs that are computed together."""

DEPTH = 32
"""Numbers of bfloat16 in a row of a tile."""

TILE_BYTES = 1024
LINE_BYTES = 64

zero_00, zero_10, zero_01, zero_11 = (tiles.zero(tile) for tile in range(4))
store_00, store_10, store_01, store_11 = (tiles.store(tile) for tile in range(4))
load_upper, load_lower, load_first, load_second = (tiles.load(tile) for tile in range(4, 8))
add_00, add_10 = tiles.multiply_into(0, 4, 6), tiles.multiply_into(1, 5, 6)
add_01, add_11 = tiles.multiply_into(2, 4, 7), tiles.multiply_into(3, 5, 7)


def _pack(rows: int, num_in: int, num_groups: int, packed: int) -> None:
    """Rows of bfloat16 in whole groups of 16, as tiles that are right factors."""
    num_steps = num_in // DEPTH
    for group in range(num_groups):
        for step in range(num_steps):
            source = rows + 2 * (group * SIDE * num_in + step * DEPTH)
            tiles.transpose(source, 2 * num_in, packed + (group * num_steps + step) * TILE_BYTES)


pack = compiled.jit(_pack)


def _add_bias(sums: Floats, bias: Floats) -> None:
    for j in range(SIDE):
        for i in range(SIDE):
            sums[SIDE * j + i] += bias[j]


add_bias = compiled.jit(_add_bias)


def _ask_for(address: int, num_bytes: int) -> None:
    for offset in range(0, num_bytes, LINE_BYTES):
        prefetch(address + offset)


ask_for = compiled.jit(_ask_for)


def _tile_sums(
    rows: int,
    num_in: int,
    num_groups: int,
    blocks: Ints,
    bias: Floats,
    packed: Ints,
    scratch: Floats,
    configuration: npt.NDArray[np.uint8],
    out: int,
    out_width: int,
) -> None:
    """out[i, columns of block] = sum of rows[i] * weight[j], for blocks of any weights with as many inputs.

    Args:
        rows: address of [16 * num_groups, num_in] bfloat16; num_in a multiple of DEPTH.
        blocks: [num_blocks, 2]: address of the first of BLOCK rows of a weight, and its column in `out`.
        bias: [out_width] or empty.
        packed, scratch: memory of the loop: 1,024 bytes for each tile of the rows, [num_blocks, 4, 256].
        out: address of [16 * num_groups, out_width] bfloat16.
    """
    num_steps, row_bytes = num_in // DEPTH, 2 * num_in
    block_bytes = BLOCK * row_bytes
    group_bytes = num_steps * TILE_BYTES
    start = packed.ctypes.data
    pack(rows, num_in, num_groups, start)
    for index in numba.prange(len(blocks)):
        block = np.int64(index)
        tiles.configure(configuration.ctypes.data)
        upper, column = blocks[block, 0], blocks[block, 1]
        lower = upper + SIDE * row_bytes
        sums = scratch[block].ctypes.data
        for group in range(0, num_groups, 2):
            first = start + group * group_bytes
            has_second = group + 1 < num_groups
            zero_00()
            zero_10()
            zero_01()
            zero_11()
            for step in range(num_steps):
                load_first(first + step * TILE_BYTES, LINE_BYTES)
                load_upper(upper + step * LINE_BYTES, row_bytes)
                load_lower(lower + step * LINE_BYTES, row_bytes)
                add_00()
                add_10()
                if has_second:
                    load_second(first + group_bytes + step * TILE_BYTES, LINE_BYTES)
                    add_01()
                    add_11()
                if group == 0:  # the block behind this one is on its way meanwhile
                    ask_for(upper + block_bytes + 2 * step * TILE_BYTES, 2 * TILE_BYTES)
            store_00(sums, LINE_BYTES)
            store_10(sums + TILE_BYTES, LINE_BYTES)
            store_01(sums + 2 * TILE_BYTES, LINE_BYTES)
            store_11(sums + 3 * TILE_BYTES, LINE_BYTES)
            for half in range(4 if has_second else 2):
                place = column + SIDE * (half % 2)
                if len(bias):
                    add_bias(scratch[block, half], bias[place : place + SIDE])
                target = out + 2 * ((group + half // 2) * SIDE * out_width + place)
                tiles.transpose_rounded(sums + half * TILE_BYTES, target, 2 * out_width)
        tiles.release()


tile_sums = compiled.jit(_tile_sums, parallel=True)
