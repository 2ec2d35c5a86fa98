"""Where a program keeps each number of a token's KV, found by measuring.

Numbers are written through the program's own kernel, and looked for in its memory. So no kernel's packing is known by
heart, and one that packs otherwise tomorrow is read rightly, or refused. Knows tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomm.errors import UnsupportedModel

BASE = 100
"""Numbers are told by digits that every dtype of KV holds exactly."""

EXACT_TOLERANCE = 1e-4
"""Largest difference of KV in float32 up to which kvcomm's kernels count as exact beside vLLM's."""

Write = Callable[[Tensor, Tensor, Tensor], None]
"""Key and value [num_tokens, num_kv_heads, dim], and the slots [num_tokens] that they are written to."""


@dataclass(frozen=True)
class LayerLayout:
    """The memory of one layer as tokens.

    Attributes:
        keys, values: [num_blocks, block_size, num_kv_heads, dim], views of the program's memory.
    """

    keys: Tensor
    values: Tensor

    def read(self, blocks: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Copies of key and value [end - start, num_kv_heads, dim] of positions `[start, end)`.

        Args:
            blocks: [>= ceil(end / block_size)], of positions 0.. in order.
        """
        block_size = self.keys.shape[1]
        first, last = start // block_size, -(-end // block_size)
        wanted = slice(start - first * block_size, end - first * block_size)
        found = (each[blocks[first:last]].flatten(0, 1)[wanted] for each in (self.keys, self.values))
        keys, values = (each.contiguous() for each in found)
        return keys, values


class Probe(NamedTuple):
    """What was measured at start.

    Attributes:
        difference: largest, of KV computed with kvcomm's attention and with vLLM's; None: it could not be measured.
    """

    difference: float | None

    @property
    def is_exact(self) -> bool:
        """Whether kvcomm's own KV may stand for vLLM's."""
        return self.difference is not None and self.difference <= EXACT_TOLERANCE


def measure(memory: Tensor, num_blocks: int, block_size: int, num_kv_heads: int, dim: int, write: Write) -> LayerLayout:
    """Find where a layer keeps its KV; blocks 1 and 2 are overwritten.

    Args:
        memory: what the program calls the layer's cache, of any shape.
        write: the program's own kernel.

    Raises:
        UnsupportedModel: numbers that were written are not found, or lie in no regular order.
    """
    region, offsets = _region(memory, num_blocks)
    shape = (2 * block_size, num_kv_heads, dim)
    found = [_find(region, shape, block_size, write, is_key=is_key) for is_key in (True, False)]
    return LayerLayout(*(_view(memory, offsets[place], num_blocks, block_size, num_kv_heads, dim) for place in found))


def _region(memory: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Blocks 1 and 2 of the memory as it lies, and where in the memory each of their numbers is: [num_numbers]."""
    dims = [d for d, size in enumerate(memory.shape) if size >= num_blocks and size % num_blocks == 0]
    if num_blocks < 3 or not dims:
        raise UnsupportedModel(f"KV of shape {list(memory.shape)} has no dimension of {num_blocks} blocks")
    dim = dims[0]
    ratio = memory.shape[dim] // num_blocks  # of the blocks that kernels see to those that are handed out
    region = memory.narrow(dim, ratio, 2 * ratio)
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(region.shape, region.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size) * stride
    return region, offsets.reshape(-1) + int(region.storage_offset())


def _find(region: Tensor, shape: tuple[int, int, int], block_size: int, write: Write, *, is_key: bool) -> Tensor:
    """For each number of keys or values of two blocks, where in the region it is: [2 * block_size, heads, dim]."""
    num = shape[0] * shape[1] * shape[2]
    slots = torch.arange(block_size, block_size + shape[0], device=region.device)
    numbers = torch.arange(num)
    names = torch.zeros(region.numel(), dtype=torch.int64)
    is_written = torch.ones(region.numel(), dtype=torch.bool)
    scale, seen = 1, []
    while scale < num:
        digits = (numbers // scale % BASE + 1).reshape(shape).to(region)
        others = torch.zeros_like(digits)
        write(*((digits, others) if is_key else (others, digits)), slots)
        got = region.reshape(-1).cpu().double().round().long()
        is_written &= (got >= 1) & (got <= BASE)
        names += (got - 1) * scale
        seen.append(got)
        scale *= BASE
    places = is_written.nonzero()[:, 0]
    if len(places) != num or not torch.equal(names[places].sort().values, numbers):
        raise UnsupportedModel(f"of {num} numbers written to KV {len(places)} were found again")
    found = torch.empty(num, dtype=torch.int64)
    found[names[places]] = places
    return found.reshape(shape)


def _view(memory: Tensor, places: Tensor, num_blocks: int, block_size: int, num_kv_heads: int, dim: int) -> Tensor:
    """All blocks as a strided view, where two blocks are in such an order: places [2 * block_size, heads, dim]."""
    origin = int(places[0, 0, 0])
    block_stride = int(places[block_size, 0, 0]) - origin
    strides = [
        int(places[index]) - origin if size > 1 else 0
        for index, size in (((1, 0, 0), block_size), ((0, min(1, num_kv_heads - 1), 0), num_kv_heads))
    ]
    strides.append(int(places[0, 0, 1]) - origin)
    axes = (torch.arange(size) for size in (2, block_size, num_kv_heads, dim))
    blocks, tokens, heads, channels = axes
    regular = (
        origin
        + blocks[:, None, None, None] * block_stride
        + tokens[:, None, None] * strides[0]
        + heads[:, None] * strides[1]
        + channels * strides[2]
    )
    if not torch.equal(regular.reshape(places.shape), places):
        raise UnsupportedModel("KV is packed in no regular order; only what is written by kernels can be used")
    return memory.as_strided(
        (num_blocks, block_size, num_kv_heads, dim), (block_stride, *strides), origin - block_stride
    )
