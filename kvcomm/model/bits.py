"""Numbers of 32 and 16 bits in loops compiled by numba. Importing this file needs numba, see `kvcomm.model.compiled`.

Numba knows no bfloat16. Arrays of it are taken as uint16, the bits; every number read is widened to float32, which is
exact, and what is stored is rounded once, to the nearest even. The same loop so serves float32 and bfloat16: what an
array holds is seen in its dtype when the loop is compiled.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_INT32, _FLOAT = ir.IntType(32), ir.FloatType()


def _float_of_bits(typing_context: Any, bits: Any) -> Any:
    """The float32 with the bits of an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(types.int32), generate


def _widen(typing_context: Any, number: Any) -> Any:
    """A float32 as it is, or the float32 that equals the bfloat16 with the bits of a uint16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if number == types.float32:
            return arguments[0]
        bits = builder.shl(builder.zext(arguments[0], _INT32), ir.Constant(_INT32, 16))
        return builder.bitcast(bits, _FLOAT)

    return types.float32(number), generate


def _rounded(typing_context: Any, number: Any, like: Any) -> Any:
    """A float32 in the form of `like`: as it is, or the bits of the nearest bfloat16, ties to even; NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if like == types.float32:
            return arguments[0]
        return bfloat16_bits(builder, builder.bitcast(arguments[0], _INT32))

    return like(types.float32, like), generate


def bfloat16_bits(builder: Any, bits: Any) -> Any:
    """Emit the rounding of float32, given as int32 or a vector of them, to bfloat16, as int16 alike."""
    wide = bits.type
    lanes = wide.count if isinstance(wide, ir.VectorType) else 0
    narrow = ir.VectorType(ir.IntType(16), lanes) if lanes else ir.IntType(16)

    def constant(value: int) -> Any:
        return ir.Constant(wide, [value] * lanes if lanes else value)

    upper = builder.lshr(bits, constant(16))
    is_odd = builder.and_(upper, constant(1))
    nearest = builder.lshr(builder.add(bits, builder.add(is_odd, constant(0x7FFF))), constant(16))
    is_nan = builder.icmp_unsigned(">", builder.and_(bits, constant(0x7FFFFFFF)), constant(0x7F800000))
    return builder.trunc(builder.select(is_nan, builder.or_(upper, constant(0x40)), nearest), narrow)


def _prefetch(typing_context: Any, address: Any) -> Any:
    """Ask for the 64 bytes around an address, which need not be anybody's."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _INT32, _INT32, _INT32])
        function = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(
            builder.module, kind, "llvm.prefetch.p0"
        )
        # To read, into the second nearest cache, data.
        options = [ir.Constant(_INT32, value) for value in (0, 2, 1)]
        builder.call(function, [builder.inttoptr(arguments[0], byte), *options])
        return context.get_dummy_value()

    return types.void(types.intp), generate


float_of_bits: Any = intrinsic(_float_of_bits)
widen: Any = intrinsic(_widen)
rounded: Any = intrinsic(_rounded)
prefetch: Any = intrinsic(_prefetch)
