"""Spaces and KV for tests of tiers: two layers of unequal shapes, every number told by its token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvcomm.memory.pool import LayerShape
from kvcomm.tiers.space import KV, TierSpace

NAMESPACE = "0123456789abcdef" * 4
SHAPES = (LayerShape(1, 2, 4), LayerShape(3, 2, 2))
VOCAB_SIZE = 97
SECRET = b"sixteen bytes or more"
RUN = 4
"""Tokens of a run in tests."""


def make_space(**changes: Any) -> TierSpace:
    values: dict[str, Any] = {
        "namespace": NAMESPACE,
        "producer": "kvcomm",
        "tenant": "default",
        "shapes": SHAPES,
        "dtype": torch.float32,
        "vocab_size": VOCAB_SIZE,
    }
    return TierSpace(**values | changes)


def make_kv(token_ids: Sequence[int], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> KV:
    """KV of a prefix; that of each token depends on it, its position, and the seed."""

    def rows(layer: int, heads: int, dim: int) -> torch.Tensor:
        size = heads * dim
        told = [
            [1000 * seed + 100 * layer + token + position / 64 + channel / 1024 for channel in range(size)]
            for position, token in enumerate(token_ids)
        ]
        return torch.tensor(told, dtype=dtype).reshape(len(token_ids), heads, dim)

    keys = [rows(layer, shape.num_kv_heads, shape.key_dim) for layer, shape in enumerate(SHAPES)]
    values = [rows(layer + 10, shape.num_kv_heads, shape.value_dim) for layer, shape in enumerate(SHAPES)]
    return KV(keys, values)


def is_same(left: KV, right: KV) -> bool:
    """Bit by bit."""
    pairs = zip((*left.keys, *left.values), (*right.keys, *right.values), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)
