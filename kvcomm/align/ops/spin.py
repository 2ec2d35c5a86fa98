"""Rotations on the CPU: fused multiply-adds on the two halves of each channel pair, without temporaries."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomm.model.rope import RopeGeometry


def cos_and_sin(rope: RopeGeometry, positions: Tensor) -> tuple[Tensor, Tensor]:
    """[num_positions, 1, rotary_dim / 2] each, float32, for keys [num_positions, num_heads, dim]."""
    inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float32, device=positions.device)
    angles = positions.float()[:, None, None] * inv_freq
    return angles.cos(), angles.sin()


def pair_halves(keys: Tensor, rope: RopeGeometry) -> tuple[Tensor, Tensor]:
    """Views of the first and the second channel of every rotated pair, [..., rotary_dim / 2] each."""
    turned = keys[..., : rope.rotary_dim]
    if rope.interleaved:
        return turned[..., 0::2], turned[..., 1::2]
    first, second = turned.chunk(2, -1)
    return first, second


def put_turned(out: Tensor, keys: Tensor, rope: RopeGeometry, cos: Tensor, sin: Tensor) -> None:
    """Write the rotated channels of `keys` to `out`, which must be another tensor of the same shape; float32."""
    (out_first, out_second), (first, second) = pair_halves(out, rope), pair_halves(keys, rope)
    torch.mul(first, cos, out=out_first)
    out_first.addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second)
    out_second.addcmul_(first, sin)


def add_turned(out: Tensor, keys: Tensor, rope: RopeGeometry, cos: Tensor, sin: Tensor) -> None:
    """Add the rotated channels of `keys` to `out`; float32."""
    (out_first, out_second), (first, second) = pair_halves(out, rope), pair_halves(keys, rope)
    out_first.addcmul_(first, cos).addcmul_(second, sin, value=-1)
    out_second.addcmul_(second, cos).addcmul_(first, sin)
