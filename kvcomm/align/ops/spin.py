"""Rotations on the CPU as few passes over whole rows.

A rotation is x cos + q(x) sin, where q turns every channel pair by a quarter: (first, second) -> (-second, first).
Channels that are not rotated have cos 1 and sin 0, so rows are never cut. Elementwise operators are several times
faster on whole contiguous rows than on the halves of heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvcomm.model.rope import RopeGeometry


class Turn(NamedTuple):
    """Rotations for rows of keys.

    Attributes:
        cos, sin: [num_positions, num_heads * dim] float32.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def to(cls, positions: Tensor, rope: RopeGeometry, *, num_heads: int, dim: int) -> Turn:
        """By `positions`, [num_positions], one row each."""
        angles = positions.float()[:, None] * torch.tensor(rope.inv_freq, dtype=torch.float32)
        cos, sin = torch.ones(len(positions), dim), torch.zeros(len(positions), dim)
        for half in pair_halves(cos, rope):
            half.copy_(angles.cos())
        for half in pair_halves(sin, rope):
            half.copy_(angles.sin())
        return cls(cos.repeat(1, num_heads), sin.repeat(1, num_heads))


def pair_halves(keys: Tensor, rope: RopeGeometry) -> tuple[Tensor, Tensor]:
    """Views of the first and the second channel of every rotated pair, [..., rotary_dim / 2] each."""
    turned = keys[..., : rope.rotary_dim]
    if rope.interleaved:
        return turned[..., 0::2], turned[..., 1::2]
    first, second = turned.chunk(2, -1)
    return first, second


def quarter_turned(keys: Tensor, rope: RopeGeometry) -> Tensor:
    """q(x) of keys [..., dim], any signed dtype; channels that are not rotated are 0."""
    out = torch.zeros_like(keys)
    (out_first, out_second), (first, second) = pair_halves(out, rope), pair_halves(keys, rope)
    out_first.copy_(-second)
    out_second.copy_(first)
    return out


def put_turned(out: Tensor, keys: Tensor, rope: RopeGeometry, turn: Turn) -> None:
    """Write keys [num_tokens, num_heads, dim], all turned by the one row of `turn`, to `out`, another such tensor."""
    torch.mul(keys.flatten(1), turn.cos, out=out.flatten(1))
    (out_first, out_second), (first, second) = pair_halves(out, rope), pair_halves(keys, rope)
    sin = pair_halves(turn.sin[0, : keys.shape[-1]], rope)[0]
    out_first.addcmul_(second, sin, value=-1)
    out_second.addcmul_(first, sin)
