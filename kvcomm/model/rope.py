"""Rotary position embeddings as geometry: what a model does to its keys, and doing the same.

Source: RoFormer, arXiv 2104.09864v5, Sec. 3.4.2; `inv_freq` is the paper's theta. Deviation: besides the paper's
interleaved pairs (2i, 2i+1), channels i and i + rotary_dim/2 may be paired, as in Llama checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LENGTH_DEPENDENT_ROPES = frozenset({"dynamic", "longrope"})
"""Rope types of transformers whose frequencies change with the length of the text, in the pass itself."""


@dataclass(frozen=True)
class RopeGeometry:
    """The rotation of one layer's keys.

    Attributes:
        kind: transformers' rope type ("default", "llama3", "yarn", ...).
        inv_freq: [rotary_dim / 2], radians per position; only the first rotary_dim channels of a key are rotated.
        interleaved: pairs are channels (2i, 2i+1) instead of (i, i + rotary_dim/2).
        attention_scaling: factor the model puts on cos and sin; it cancels in a relative rotation.
    """

    kind: str
    inv_freq: tuple[float, ...]
    interleaved: bool
    attention_scaling: float = 1.0

    @property
    def rotary_dim(self) -> int:
        """Number of rotated channels."""
        return 2 * len(self.inv_freq)


def rotate(keys: Tensor, delta: int | Tensor, rope: RopeGeometry) -> Tensor:
    """Move rotated keys by `delta` positions.

    Args:
        keys: [..., head_dim], any float dtype, head_dim >= rope.rotary_dim.
        delta: positions; may be negative. A tensor, [num_tokens], moves each token of keys
            [num_tokens, num_heads, head_dim] by its own.

    Returns:
        New tensor like `keys`; angles are float32 and the result is rounded once. `keys` is not modified.
    """
    inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float32, device=keys.device)
    angle = delta.float()[:, None, None] * inv_freq if isinstance(delta, Tensor) else delta * inv_freq
    cos, sin = angle.cos(), angle.sin()
    turned, rest = keys[..., : rope.rotary_dim].float(), keys[..., rope.rotary_dim :]
    if rope.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        moved = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        moved = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((moved.to(keys.dtype), rest), -1)
