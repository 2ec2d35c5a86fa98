"""Block sizes and compile-time arguments of the moving kernel.

The launcher and scripts/compile_kernels.py both take them from here, so what is checked ahead of time is what is
launched. Chosen by registers, spills and loads; none of them has been timed.
"""

from __future__ import annotations

from typing import NamedTuple

from kvcomm.model.rope import RopeGeometry

NO_ROPE, HALVES, INTERLEAVED = 0, 1, 2

NUM_THREADS = 128
"""Of a program; warps of a device are so many threads divided by its warp size."""

BLOCK_ELEMENTS = 2048
"""Of one tile: 16 codes for each thread, which is one 128-bit load."""


class RowKind(NamedTuple):
    """What the kernel is specialized for.

    Attributes:
        dim: channels of a head.
        rotary_dim: of them, rotated; 0: none.
        interleaved: pairs are neighbors.
        k: anchors per token; 0: no offsets.
    """

    dim: int
    rotary_dim: int
    interleaved: bool
    k: int

    @classmethod
    def of(cls, dim: int, rope: RopeGeometry | None, k: int) -> RowKind:
        """Rows of `dim` channels that turn like `rope`, or not at all."""
        return cls(dim, 0, False, k) if rope is None else cls(dim, rope.rotary_dim, rope.interleaved, k)

    @property
    def widest_tile(self) -> int:
        """Columns of the widest tile."""
        half = padded(self.rotary_dim // 2) if self.rotary_dim else 0
        return max(2 * half if self.interleaved else half, self.block_rest)

    @property
    def block_rest(self) -> int:
        """Columns of the tile that is not rotated; 0: there is none."""
        return padded(self.dim - self.rotary_dim) if self.dim > self.rotary_dim else 0

    @property
    def block_tokens(self) -> int:
        """Tokens of a program."""
        return max(1, BLOCK_ELEMENTS // self.widest_tile)

    def constants(self) -> dict[str, int]:
        """The compile-time arguments, but for ELEMENT."""
        layout = INTERLEAVED if self.interleaved else HALVES
        return {
            "DIM": self.dim,
            "ROTARY": self.rotary_dim,
            "ROPE": layout if self.rotary_dim else NO_ROPE,
            "K": self.k,
            "BLOCK_TOKENS": self.block_tokens,
            "BLOCK_HALF": padded(self.rotary_dim // 2) if self.rotary_dim else 1,
            "BLOCK_REST": self.block_rest,
        }

    def token_bytes(self, element_bytes: int) -> int:
        """Bytes that moving one token of one head in one layer reads and writes, tables of rotations left out."""
        anchors = self.k * (self.dim + 4 + 4 + 4)  # codes; scale, index and weight
        return 2 * self.dim * element_bytes + 2 * 8 + anchors


def padded(dim: int) -> int:
    """The power of two that columns are padded to inside the kernel."""
    return 1 << max(0, dim - 1).bit_length()
