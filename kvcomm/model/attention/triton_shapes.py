"""Block sizes, launch options and compile-time arguments of the Triton kernels.

The launcher and scripts/compile_kernels.py both take them from here, so what is checked ahead of time is what is
launched. The shapes are chosen so that nothing spills on sm_80, sm_90 and gfx942 at head sizes 64, 128 and 256; none
of them has been timed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvcomm.model.attention.triton_plan import MAX_PARTS, NARROW_ROWS

WRITE_TOKENS = 16
"""Tokens that one program of `write_kv` scatters."""

WRITE_WARPS = 2
MERGE_WARPS = 4


class TileShape(NamedTuple):
    """Block sizes and launch options of `attend`."""

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int


def tile_shape(dtype: torch.dtype, key_dim: int, value_dim: int, *, wide: bool) -> TileShape:
    """Tile shape by dtype and head size; scripts/compile_kernels.py checks it for spills."""
    is_large = max(padded(key_dim), padded(value_dim)) > 128
    num_warps = 8 if wide and is_large else 4
    if dtype == torch.float32:
        return TileShape(32 if wide else NARROW_ROWS, 16, num_warps, 2)
    if wide:
        return TileShape(64, 32, num_warps, 2)
    return TileShape(NARROW_ROWS, 32 if is_large else 64, num_warps, 2)


def padded(dim: int) -> int:
    """The power of two that a head dimension is padded to inside a kernel."""
    return max(16, 1 << (dim - 1).bit_length())


def write_constants(key_dim: int, value_dim: int) -> dict[str, int]:
    """The compile-time arguments of `write_kv`."""
    return {
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_TOKENS": WRITE_TOKENS,
        "BLOCK_KEY_DIM": padded(key_dim),
        "BLOCK_VALUE_DIM": padded(value_dim),
    }


def attend_constants(
    shape: TileShape,
    *,
    key_dim: int,
    value_dim: int,
    group_size: int,
    page_size: int,
    has_window: bool,
    has_softcap: bool,
) -> dict[str, int]:
    """The compile-time arguments of `attend`, but for DOT_FLOAT32."""
    return {
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "GROUP": group_size,
        "PAGE_SIZE": page_size,
        "HAS_WINDOW": has_window,
        "HAS_SOFTCAP": has_softcap,
        "BLOCK_ROWS": shape.block_rows,
        "BLOCK_KEYS": shape.block_keys,
        "BLOCK_KEY_DIM": padded(key_dim),
        "BLOCK_VALUE_DIM": padded(value_dim),
    }


def merge_constants(value_dim: int) -> dict[str, int]:
    """The compile-time arguments of `merge_splits`."""
    return {"VALUE_DIM": value_dim, "BLOCK_PARTS": MAX_PARTS, "BLOCK_VALUE_DIM": padded(value_dim)}
