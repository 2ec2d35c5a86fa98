"""What the self-test of the Triton back end computes: small passes that reach every kernel and every kind of tile.

Each pass goes through the contract as a model's layer would, over permuted pages of a pool whose other slots are NaN,
and is held against the equation in float64. The new keys and values must lie in their slots bit for bit, and every
other slot must be as it was. Runs in the process of `kvcomm.model.self_test`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvcomm.model.attention.contract import AttentionBackend, IntArray, RunTable
from kvcomm.model.attention.reference import paged_attention_reference
from kvcomm.model.attention.torch_backend import TorchBackend
from kvcomm.model.self_test import KernelsDiffer, SelfTest, described, require_close, require_same_bits

TRITON_ATTENTION = SelfTest("attention back end 'triton'", __name__, "torch")
"""What has to pass on a device before Triton's attention is used there."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Shape(NamedTuple):
    """A kind of pass.

    Attributes:
        name: for messages.
        spans: (sequence, start, end) of every run.
        heads: query heads and key heads.
        dims: of a key and of a value.
        windows: each is a pass of its own.
        softcap, has_sinks: see `AttentionStep`.
    """

    name: str
    spans: tuple[tuple[int, int, int], ...]
    heads: tuple[int, int]
    dims: tuple[int, int]
    page_size: int = 16
    windows: tuple[int | None, ...] = (None, 6)
    softcap: float | None = None
    has_sinks: bool = False


PREFILL = ((0, 0, 1), (1, 0, 15), (2, 0, 16), (3, 0, 17), (4, 0, 70))
MIDDLE = ((0, 30, 41), (1, 33, 34), (0, 2, 5), (0, 6, 8), (2, 20, 60))
DECODE = ((0, 1100, 1101), (1, 0, 1), (2, 63, 64), (3, 128, 129))  # the first one is split and merged

SHAPES = (
    Shape("prefill", PREFILL, (6, 2), (64, 64)),
    Shape("runs in the middle", MIDDLE, (6, 2), (64, 64)),
    Shape("decode", DECODE, (4, 1), (64, 64), windows=(None, 100, 1050)),
    Shape("heads of 128", ((0, 0, 33), (1, 40, 41)), (4, 1), (128, 128)),
    Shape("heads of 256", ((0, 0, 33), (1, 40, 41)), (2, 1), (256, 256)),
    Shape("capped scores and sinks", ((0, 0, 17), (1, 40, 41)), (4, 2), (64, 64), softcap=3.0, has_sinks=True),
    Shape("odd sizes", ((0, 3, 12), (1, 9, 10)), (20, 1), (80, 96), page_size=5),
)


class PassTensors(NamedTuple):
    """The tensors of one pass over one layer."""

    runs: tuple[RunTable, ...]
    page_size: int
    keys: Tensor  # [num_slots, num_kv_heads, key_dim], NaN but in the slots of the sequences
    values: Tensor
    query: Tensor  # [1, num_heads, num_tokens, key_dim], strided as a model hands it over
    key: Tensor
    value: Tensor
    softcap: float | None
    sinks: Tensor | None  # [num_heads]

    @classmethod
    def of(cls, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> PassTensors:
        """Seeded; keys are normal, values and so results lie within one."""
        generator = torch.Generator().manual_seed(seed)
        tables, num_pages = _tables(shape, seed)
        num_heads, num_kv_heads = shape.heads
        key_dim, value_dim = shape.dims
        num_tokens = sum(end - start for _, start, end in shape.spans)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator)

        def uniform(*sizes: int) -> Tensor:
            return torch.rand(*sizes, generator=generator) * 2 - 1

        def in_slots(rows: Tensor) -> Tensor:
            stored = torch.full_like(rows, torch.nan)
            for table, (_, _, end) in zip(tables, shape.spans, strict=True):
                slots = _slots(table, 0, end, shape.page_size)
                stored[slots] = rows[slots]
            return stored.to(dtype).to(device)

        return cls(
            tuple(RunTable(table, start, end) for table, (_, start, end) in zip(tables, shape.spans, strict=True)),
            shape.page_size,
            in_slots(normal(num_pages * shape.page_size, num_kv_heads, key_dim)),
            in_slots(uniform(num_pages * shape.page_size, num_kv_heads, value_dim)),
            normal(1, num_tokens, num_heads, key_dim).to(dtype).to(device).transpose(1, 2),
            normal(1, num_tokens, num_kv_heads, key_dim).to(dtype).to(device).transpose(1, 2),
            uniform(1, num_tokens, num_kv_heads, value_dim).to(dtype).to(device).transpose(1, 2),
            shape.softcap,
            normal(num_heads).to(device) if shape.has_sinks else None,
        )

    @property
    def scale(self) -> float:
        """Scores of a few units, so that a softmax has both large and small weights."""
        return 2 / math.sqrt(self.keys.shape[2])

    def written(self, stored: Tensor, new: Tensor) -> Tensor:
        """What the storage should hold afterwards."""
        slots = np.concatenate([_slots(run.pages, run.start, run.end, self.page_size) for run in self.runs])
        copy = stored.clone()
        copy[torch.from_numpy(slots).to(stored.device)] = new[0].transpose(0, 1)
        return copy

    def truth(self, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """The equation in float64 on what the storages hold."""
        query, keys, values = (each.cpu().double() for each in (self.query, keys, values))
        sinks = None if self.sinks is None else self.sinks.cpu().double()
        return paged_attention_reference(
            query, keys, values, self.runs, self.page_size, self.scale, window, softcap=self.softcap, sinks=sinks
        )[0]


def examine(
    device: torch.device,
    backend: AttentionBackend | None = None,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    head_dims: Collection[int] | None = None,
    plain_scores: bool = False,
) -> None:
    """Compute all passes by the Triton back end, or those that another one serves.

    Args:
        dtypes: that it computes in.
        head_dims: channels that its heads may have; None: any.
        plain_scores: leave out capped scores and sinks.

    Raises:
        KernelsDiffer: the first pass that differs, or cannot be computed, and how torch's back end does there.
    """
    if backend is None:
        from kvcomm.model.attention.triton import TritonBackend

        backend = TritonBackend()
    shapes = [shape for shape in SHAPES if head_dims is None or set(shape.dims) <= set(head_dims)]
    if plain_scores:
        shapes = [shape for shape in shapes if shape.softcap is None and not shape.has_sinks]
    passes = ((shape, window, dtype) for shape in shapes for window in shape.windows for dtype in dtypes)
    for seed, (shape, window, dtype) in enumerate(passes):
        label = _label(shape, window, dtype)
        try:
            _examine(PassTensors.of(shape, dtype, device, seed), window, backend)
        except Exception as error:  # a compiler's or a driver's too
            torchs = _how_torch_does(PassTensors.of(shape, dtype, device, seed), window)
            raise KernelsDiffer(f"{label}: {described(error)}; torch's back end {torchs} there") from error


def _how_torch_does(made: PassTensors, window: int | None) -> str:
    try:
        _examine(made, window, TorchBackend())
    except Exception as error:
        return f"fails as well ({described(error)})"
    return "is right"


def _examine(made: PassTensors, window: int | None, backend: AttentionBackend) -> None:
    keys, values = made.written(made.keys, made.key), made.written(made.values, made.value)
    step = backend.prepare(made.runs, [made.keys], [made.values], made.page_size)
    out = step(
        0,
        made.query,
        made.key,
        made.value,
        scale=made.scale,
        sliding_window=window,
        softcap=made.softcap,
        sinks=made.sinks,
    )
    require_same_bits("keys in the pool", made.keys, keys)
    require_same_bits("values in the pool", made.values, values)
    if out.dtype != made.query.dtype:
        raise KernelsDiffer(f"the result is {out.dtype}")
    require_close("the result", out, made.truth(keys, values, window), largest=1.0)


def _label(shape: Shape, window: int | None, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"{shape.name}, {name}" + ("" if window is None else f", window {window}")


def _tables(shape: Shape, seed: int) -> tuple[list[IntArray], int]:
    """The page table of every run, and the pages of a pool that is larger than needed."""
    ends: dict[int, int] = {}
    for sequence, _, end in shape.spans:
        ends[sequence] = max(end, ends.get(sequence, 0))
    counts = [-(-end // shape.page_size) for end in ends.values()]
    num_pages = sum(counts) + 3
    ids = np.random.default_rng(seed).permutation(num_pages).astype(np.int32)
    bounds = np.cumsum([0, *counts])
    pages = {sequence: ids[a:b] for sequence, (a, b) in zip(ends, pairwise(bounds), strict=True)}
    return [pages[sequence] for sequence, _, _ in shape.spans], num_pages


def _slots(pages: IntArray, start: int, end: int, page_size: int) -> np.ndarray:
    positions = np.arange(start, end)
    return pages[positions // page_size].astype(np.int64) * page_size + positions % page_size
