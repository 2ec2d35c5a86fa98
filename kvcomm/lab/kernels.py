"""Kernels by themselves: attention back ends and the operations that move KV, on made-up layers, and their self-tests.

Attention: each back end prepares a pass over `RunTable`s and then computes layer by layer (`AttentionStep`), into keys
and values that hold what came before; `paged_attention_reference` is the equation. Moving: `Ops` write the KV of one
`Place` of some layers to another one, turned, or corrected by an `OffsetTable`'s nearest rows as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kvcomm.align.offsets import OffsetRows, OffsetTable
from kvcomm.align.ops.choice import make_ops
from kvcomm.align.ops.contract import LayerStore, Neighbors, Ops, Place
from kvcomm.align.ops.self_test import TRITON_MOVES
from kvcomm.align.ops.triton_launch import Mover
from kvcomm.align.spans import layer_stores
from kvcomm.engine.engine import Engine
from kvcomm.model.attention.contract import AttentionBackend, AttentionStep, RunTable
from kvcomm.model.attention.flashinfer import FlashInferBackend
from kvcomm.model.attention.reference import paged_attention_reference
from kvcomm.model.attention.self_test import TRITON_ATTENTION
from kvcomm.model.attention.torch_backend import TorchBackend
from kvcomm.model.attention.triton import TritonBackend
from kvcomm.model.rope import RopeGeometry
from kvcomm.model.self_test import TIMEOUT_S, described, in_a_process

__all__ = [
    "TIMEOUT_S",
    "TRITON_ATTENTION",
    "TRITON_MOVES",
    "AttentionBackend",
    "AttentionStep",
    "FlashInferBackend",
    "LayerStore",
    "Neighbors",
    "OffsetTable",
    "Ops",
    "Place",
    "RunTable",
    "TorchBackend",
    "TritonBackend",
    "described",
    "in_a_process",
    "kv_bytes",
    "made_layers",
    "made_neighbors",
    "made_offsets",
    "make_ops",
    "paged_attention_reference",
    "pool_layers",
    "untested_triton_ops",
]

ROPE_BASE = 1e4


def kv_bytes(layers: Sequence[LayerStore]) -> int:
    """Keys and values of one token over all layers."""
    return sum(stored[0].nbytes for layer in layers for stored in (layer.keys, layer.values))


def made_layers(
    num_layers: int, num_tokens: int, num_heads: int, head_dim: int, *, dtype: torch.dtype, device: torch.device | str
) -> list[LayerStore]:
    """Layers of random keys and values, [num_tokens, num_heads, head_dim] each; keys count as rotated by halves."""
    inv_freq = tuple(ROPE_BASE ** (-pair / head_dim) for pair in range(0, head_dim, 2))
    rope = RopeGeometry("default", inv_freq, interleaved=False)

    def stored() -> Tensor:
        return torch.randn((num_tokens, num_heads, head_dim), dtype=dtype, device=device)

    return [LayerStore(stored(), stored(), rope) for _ in range(num_layers)]


def made_offsets(layers: Sequence[LayerStore], count: int) -> OffsetTable:
    """Random offsets of so many anchor tokens, in all layers but the first."""

    def rows(stored: Tensor) -> OffsetRows:
        return OffsetRows.quantize(torch.randn(count, *stored.shape[1:], device=stored.device))

    keys = [rows(layer.keys) for layer in layers[1:]]
    return OffsetTable((None, *keys), (None, *(rows(layer.values) for layer in layers[1:])))


def made_neighbors(layers: Sequence[LayerStore], num_tokens: int, k: int, num_anchors: int) -> Neighbors:
    """Random ones among so many anchor tokens, weighted alike."""
    device = layers[0].keys.device
    indices = torch.randint(0, num_anchors, (1, num_tokens, k), device=device)
    weights = torch.full(indices.shape, 1 / k, device=device)
    return Neighbors(indices, weights, (0,) * len(layers))


@contextmanager
def pool_layers(engine: Engine, num_spans: int, num_tokens: int) -> Iterator[tuple[Sequence[LayerStore], list[Place]]]:
    """The layers of an engine's pool, and places in it for spans of so many tokens, which nobody else has meanwhile.

    They are filled with random numbers: pages that were never written all lie in one place of the memory. Positions of
    the spans are 100, 900, 1700 and so on.

    Raises:
        PoolExhausted: so many pages are not free.
    """
    pool, layers = engine.pool, layer_stores(engine.pool, engine.geometry)
    num_pages = -(-num_tokens // pool.page_size)
    with engine.lock:
        pages = pool.allocate(num_spans * num_pages)
    try:
        tables = [pages[index * num_pages : (index + 1) * num_pages] for index in range(num_spans)]
        places = [Place(pool.slots(table, num_tokens), 100 + 800 * index) for index, table in enumerate(tables)]
        for layer in layers:
            for stored in (layer.keys, layer.values):
                for place in places:
                    stored[place.slots] = torch.randn_like(stored[place.slots])
        yield layers, places
    finally:
        with engine.lock:
            pool.release(pages)


def untested_triton_ops() -> Ops:
    """The Triton kernels that move KV, wherever they run; `make_ops` asks their self-test first."""
    mover = Mover()
    return Ops(mover.rotate, mover.align)
