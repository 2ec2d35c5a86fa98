"""The Triton back end: paged attention on CUDA and ROCm devices.

A pass is planned on the host (`triton_plan`), uploaded once and used by every layer; a layer is one scatter
of the new keys and values and at most four launches of attention. Short runs take narrow tiles, long ones
wide tiles, single tokens with many keys are split and merged. Importing this module needs no triton; making a
`TritonBackend` does. A device that cannot run it is refused: nothing falls back to another implementation.

The kernels are checked against `reference` in Triton's interpreter (TRITON_INTERPRET=1, CPU tensors) and
compiled ahead of time for sm_80, sm_90 and gfx942 (scripts/compile_kernels.py). They have not yet run on a
GPU, so "auto" takes them only where they pass their self-test (`self_test`), and the tile shapes
(`triton_shapes`) are chosen by registers and spills, not by measured speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomm.errors import InvalidRequest
from kvcomm.model.attention.contract import AttentionStep, IntArray, RunTable
from kvcomm.model.attention.merging import weight_beside
from kvcomm.model.attention.triton_plan import AttentionPlan, RunArrays, flatten_runs, plan_attention
from kvcomm.model.attention.triton_shapes import (
    MERGE_WARPS,
    WRITE_TOKENS,
    WRITE_WARPS,
    TileShape,
    attend_constants,
    merge_constants,
    tile_shape,
    write_constants,
)
from kvcomm.model.optional import needing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonBackend:
    """Paged attention in Triton; see the module docstring.

    Raises:
        InvalidRequest: The package triton is not installed.
    """

    def __init__(self) -> None:
        self._kernels = _load_kernels()

    @property
    def name(self) -> str:
        return "triton"

    def prepare(
        self, runs: Sequence[RunTable], keys: Sequence[Tensor], values: Sequence[Tensor], page_size: int
    ) -> AttentionStep:
        """Plan one pass; see `AttentionBackend.prepare`.

        Raises:
            InvalidRequest: The storages lie on a device that cannot run Triton, or have an unsupported dtype.
            ValueError: The runs do not fit their page tables or the pool.
        """
        _check_storage(keys[0], interpreted=self._kernels.INTERPRETED)
        return TritonStep(self._kernels, flatten_runs(runs, page_size, keys[0].shape[0]), keys, values, page_size)


class TritonStep:
    """One pass. Tiles are planned once per group size, window and tile shape and shared by the layers."""

    def __init__(
        self,
        kernels: ModuleType,
        runs: RunArrays,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        page_size: int,
    ) -> None:
        self._kernels = kernels
        self._runs = runs
        self._keys, self._values = keys, values
        self._page_size = page_size
        self._device = keys[0].device
        self._slots = torch.from_numpy(runs.slots).to(self._device)
        self._page_table = torch.from_numpy(runs.page_table).to(self._device)
        self._max_end = int(runs.ends.max())
        self._plans: dict[tuple[int, int | None, int], _DevicePlan] = {}

    def __call__(
        self,
        layer_id: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Write, then attend; see `AttentionStep`.

        Raises:
            ValueError: The tensors do not fit each other, the storages or the runs; the message gives the
            shapes.
        """
        self.write(layer_id, key, value)
        out, lse = self.attend(layer_id, query, scale=scale, sliding_window=sliding_window, softcap=softcap)
        return out if sinks is None else (out * weight_beside(lse, sinks)[..., None]).to(out.dtype)

    def write(self, layer_id: int, key: Tensor, value: Tensor) -> None:
        """Scatter key [1, num_kv_heads, num_tokens, key_dim] and value of all runs to their slots."""
        keys, values = self._keys[layer_id], self._values[layer_id]
        num_tokens = len(self._slots)
        _check_new("key", key, keys, num_tokens)
        _check_new("value", value, values, num_tokens)
        grid = (-(-num_tokens // WRITE_TOKENS), keys.shape[1])
        with torch.cuda.device_of(keys):
            self._kernels.write_kv[grid](
                key,
                value,
                keys,
                values,
                self._slots,
                num_tokens,
                *key.stride()[1:],
                *value.stride()[1:],
                *keys.stride(),
                *values.stride(),
                **write_constants(keys.shape[2], values.shape[2]),
                num_warps=WRITE_WARPS,
            )

    def attend(
        self, layer_id: int, query: Tensor, *, scale: float, sliding_window: int | None, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention of all runs to what their slots hold now, without sinks.

        Returns:
            Output [1, num_tokens, num_heads, value_dim] in the dtype of `query`, and the natural logarithm of
            the softmax denominators [1, num_tokens, num_heads], float32.
        """
        keys, values = self._keys[layer_id], self._values[layer_id]
        _check_query(query, keys, len(self._slots), sliding_window)
        _, num_heads, num_tokens, _ = query.shape
        window = sliding_window if sliding_window is not None and sliding_window < self._max_end else None
        launch = _Launch(self._kernels, query, keys, values, self._page_table, self._page_size, scale, window, softcap)
        plan = self._plan(num_heads // keys.shape[1], window, launch.shape(wide=True).block_rows)
        out = query.new_empty(num_tokens, num_heads, values.shape[2])
        lse = query.new_empty(num_tokens, num_heads, dtype=torch.float32)
        with torch.cuda.device_of(keys):
            launch.attend(plan.wide, out, lse, wide=True)
            launch.attend(plan.narrow, out, lse, wide=False)
            if plan.num_parts:
                part_out = query.new_empty(plan.num_parts, num_heads, values.shape[2], dtype=torch.float32)
                part_lse = query.new_empty(plan.num_parts, num_heads, dtype=torch.float32)
                launch.attend(plan.split, part_out, part_lse, wide=False)
                launch.merge(plan.merges, part_out, part_lse, out, lse)
        return out[None], lse[None]

    def _plan(self, group_size: int, window: int | None, wide_rows: int) -> _DevicePlan:
        key = (group_size, window, wide_rows)
        if key not in self._plans:
            plan = plan_attention(self._runs, group_size=group_size, sliding_window=window, wide_rows=wide_rows)
            self._plans[key] = _DevicePlan.upload(plan, self._device)
        return self._plans[key]


class _DevicePlan(NamedTuple):
    """An `AttentionPlan` on the device; every tensor may be empty."""

    wide: Tensor
    narrow: Tensor
    split: Tensor
    merges: Tensor
    num_parts: int

    @classmethod
    def upload(cls, plan: AttentionPlan, device: torch.device) -> _DevicePlan:
        def to_device(array: IntArray) -> Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            to_device(plan.wide),
            to_device(plan.narrow),
            to_device(plan.split),
            to_device(plan.merges),
            plan.num_parts,
        )


class _Launch(NamedTuple):
    """What all launches of one layer's attention have in common."""

    kernels: ModuleType
    query: Tensor
    keys: Tensor
    values: Tensor
    page_table: Tensor
    page_size: int
    scale: float
    window: int | None
    softcap: float | None

    def shape(self, *, wide: bool) -> TileShape:
        return tile_shape(self.query.dtype, self.keys.shape[2], self.values.shape[2], wide=wide)

    def attend(self, tiles: Tensor, out: Tensor, lse: Tensor, *, wide: bool) -> None:
        """Compute tiles.

        Args:
            tiles: [num_tiles, 8]; nothing happens without any.
            out: [num_out_tokens, num_heads, value_dim], written.
            lse: [num_out_tokens, num_heads], written.
            wide: Whether the tiles have the rows of a wide tile.
        """
        if not len(tiles):
            return
        shape = self.shape(wide=wide)
        num_kv_heads = self.keys.shape[1]
        # The interpreter multiplies bfloat16 bit patterns; there the products are taken in float32.
        dot_float32 = self.kernels.INTERPRETED and self.query.dtype == torch.bfloat16
        constants = attend_constants(
            shape,
            key_dim=self.keys.shape[2],
            value_dim=self.values.shape[2],
            group_size=self.query.shape[1] // num_kv_heads,
            page_size=self.page_size,
            has_window=self.window is not None,
            has_softcap=self.softcap is not None,
        )
        self.kernels.attend[(len(tiles), num_kv_heads)](
            self.query,
            self.keys,
            self.values,
            self.page_table,
            tiles,
            out,
            lse,
            self.scale,
            self.window or 0,
            self.softcap or 0.0,
            *self.query.stride()[1:],
            *self.keys.stride(),
            *self.values.stride(),
            *out.stride(),
            *lse.stride(),
            **constants,
            DOT_FLOAT32=dot_float32,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )

    def merge(self, merges: Tensor, part_out: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
        """Merge the parts of the split runs into `out` and `lse`."""
        self.kernels.merge_splits[(len(merges), self.query.shape[1])](
            part_out,
            part_lse,
            merges,
            out,
            lse,
            *part_out.stride(),
            *part_lse.stride(),
            *out.stride(),
            *lse.stride(),
            **merge_constants(self.values.shape[2]),
            num_warps=MERGE_WARPS,
        )


def _load_kernels() -> ModuleType:
    refusal = "attention back end 'triton' needs the package triton: install kvcomm[triton], or choose 'torch'"
    with needing("triton", refusal):
        from kvcomm.model.attention import triton_kernels
    return triton_kernels


def _check_storage(keys: Tensor, *, interpreted: bool) -> None:
    if interpreted and keys.device.type != "cpu":
        raise InvalidRequest(
            f"TRITON_INTERPRET=1 runs kernels on CPU tensors, the page pool is on {keys.device}; unset it"
        )
    if not interpreted and keys.device.type != "cuda":
        raise InvalidRequest(
            f"attention back end 'triton' needs a CUDA or ROCm device, the page pool is on {keys.device}; "
            "choose the back end 'torch'"
        )
    if keys.dtype not in DTYPES:
        raise InvalidRequest(
            f"attention back end 'triton' computes in {', '.join(map(str, DTYPES))}, not in {keys.dtype}"
        )


def _check_new(name: str, new: Tensor, storage: Tensor, num_tokens: int) -> None:
    _, num_kv_heads, dim = storage.shape
    if tuple(new.shape) != (1, num_kv_heads, num_tokens, dim) or new.dtype != storage.dtype:
        raise ValueError(
            f"{name} must be {(1, num_kv_heads, num_tokens, dim)} {storage.dtype}, got {tuple(new.shape)} {new.dtype}"
        )


def _check_query(query: Tensor, keys: Tensor, num_tokens: int, sliding_window: int | None) -> None:
    _, num_kv_heads, key_dim = keys.shape
    fits = query.dim() == 4 and query.shape[0] == 1 and query.shape[2:] == (num_tokens, key_dim)
    if not fits or query.shape[1] % num_kv_heads or query.dtype != keys.dtype:
        raise ValueError(
            f"query must be [1, a multiple of {num_kv_heads}, {num_tokens}, {key_dim}] {keys.dtype}, "
            f"got {tuple(query.shape)} {query.dtype}"
        )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 or None, got {sliding_window}")
