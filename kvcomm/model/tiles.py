"""Tiles of Intel's matrix extension (AMX) in loops compiled by numba, and the transposes that go with them.

A tile is 16 rows of 64 bytes in a register of its own, numbered 0 to 7; `multiply_into` adds the product of a tile of
16 rows of 32 bfloat16 and one of 32 rows, stored pair by pair, to a tile of 16 x 16 float32 (Intel's Software
Developer's Manual, vol. 2, TDPBF16PS: denormals are taken as zero). A thread configures tiles before it uses them and
releases them afterwards; torch and oneDNN look whether they must configure anew. Addresses are numbers of bytes.

Importing this file needs numba, see `kvcomm.model.compiled`; running what it makes needs a processor for which
`are_there` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvcomm.model.bits import bfloat16_bits

SIDE = 16
"""Rows of a tile, and numbers of four bytes in each."""

_BYTE, _INT32, _INT64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_POINTER, _NOTHING = _BYTE.as_pointer(), ir.VoidType()
_WORDS = ir.VectorType(_INT32, SIDE)


@cache
def are_there() -> bool:
    """Whether this processor has tiles for bfloat16, and the system lets this process use them."""
    from llvmlite.binding import get_host_cpu_features

    features = get_host_cpu_features()
    return bool(features.get("amx-bf16") and features.get("avx512f")) and bool(torch.cpu._init_amx())


def configuration() -> np.ndarray:
    """[64] uint8: what `configure` loads, all eight tiles whole."""
    made = np.zeros(64, np.uint8)
    made[0] = 1  # the only palette there is
    made[16:32].view(np.uint16)[:] = 64  # bytes of a row
    made[48:56] = SIDE
    return made


def _configure(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _emit(builder, "llvm.x86.ldtilecfg", [builder.inttoptr(arguments[0], _POINTER)])
        return context.get_dummy_value()

    return types.void(types.intp), generate


def _release(typing_context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _emit(builder, "llvm.x86.tilerelease", [])
        return context.get_dummy_value()

    return types.void(), generate


configure: Any = intrinsic(_configure)
release: Any = intrinsic(_release)


def zero(tile: int) -> Any:
    """A function that sets this tile to zero."""
    return _on_tiles("llvm.x86.tilezero", tile)


def multiply_into(total: int, left: int, right: int) -> Any:
    """A function that adds the product of two tiles to a third."""
    return _on_tiles("llvm.x86.tdpbf16ps", total, left, right)


def load(tile: int) -> Any:
    """A function (address, bytes from row to row) that loads this tile."""
    return _on_memory("llvm.x86.tileloadd64", tile)


def store(tile: int) -> Any:
    """A function (address, bytes from row to row) that stores this tile."""
    return _on_memory("llvm.x86.tilestored64", tile)


def _on_tiles(name: str, *tiles: int) -> Any:
    def typed(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _emit(builder, name, [ir.Constant(_BYTE, tile) for tile in tiles])
            return context.get_dummy_value()

        return types.void(), generate

    return intrinsic(typed)


def _on_memory(name: str, tile: int) -> Any:
    def typed(typing_context: Any, address: Any, row_bytes: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            where = builder.inttoptr(arguments[0], _POINTER)
            _emit(builder, name, [ir.Constant(_BYTE, tile), where, arguments[1]])
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), generate

    return intrinsic(typed)


def _transpose(typing_context: Any, source: Any, source_bytes: Any, target: Any) -> Any:
    """16 rows of 16 words, `source_bytes` apart -> their transpose in 1,024 consecutive bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, row_bytes, out = arguments
        rows = _transposed(builder, [_load_row(builder, start, row_bytes, index) for index in range(SIDE)])
        for index, row in enumerate(rows):
            _store_row(builder, row, out, ir.Constant(_INT64, 4 * SIDE), index)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


def _transpose_rounded(typing_context: Any, source: Any, target: Any, target_bytes: Any) -> Any:
    """16 x 16 consecutive float32 -> their transpose in bfloat16, rows `target_bytes` apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, out, row_bytes = arguments
        width = ir.Constant(_INT64, 4 * SIDE)
        rows = _transposed(builder, [_load_row(builder, start, width, index) for index in range(SIDE)])
        for index, row in enumerate(rows):
            _store_row(builder, bfloat16_bits(builder, row), out, row_bytes, index)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


transpose: Any = intrinsic(_transpose)
transpose_rounded: Any = intrinsic(_transpose_rounded)


def _transposed(builder: Any, rows: Sequence[Any]) -> list[Any]:
    """The transpose of 16 vectors: blocks off the diagonal change places, of half the size in each of four rounds."""
    now = list(rows)
    size = SIDE // 2
    while size:
        before, now = now, list(now)
        for index in range(SIDE):
            if index & size:
                continue
            upper, lower = before[index], before[index | size]
            # Lanes of both, the second's counted on from the first's.
            to_upper = [SIDE + (lane ^ size) if lane & size else lane for lane in range(SIDE)]
            to_lower = [SIDE + lane if lane & size else lane | size for lane in range(SIDE)]
            now[index] = builder.shuffle_vector(upper, lower, ir.Constant(_WORDS, to_upper))
            now[index | size] = builder.shuffle_vector(upper, lower, ir.Constant(_WORDS, to_lower))
        size //= 2
    return now


def _load_row(builder: Any, start: Any, row_bytes: Any, index: int) -> Any:
    return builder.load(_row_at(builder, start, row_bytes, index, _WORDS), align=2)


def _store_row(builder: Any, row: Any, start: Any, row_bytes: Any, index: int) -> None:
    builder.store(row, _row_at(builder, start, row_bytes, index, row.type), align=2)


def _row_at(builder: Any, start: Any, row_bytes: Any, index: int, kind: Any) -> Any:
    address = builder.add(start, builder.mul(row_bytes, ir.Constant(_INT64, index)))
    return builder.inttoptr(address, kind.as_pointer())


def _emit(builder: Any, name: str, operands: Sequence[Any]) -> None:
    """Call a function that LLVM knows."""
    kind = ir.FunctionType(_NOTHING, [operand.type for operand in operands])
    builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), operands)
