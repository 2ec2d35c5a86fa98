"""The FlashInfer back end: its paged kernels for CUDA behind the same contract; taken only where it is asked for.

Every run is what FlashInfer calls an append: its queries are the last of the `end` tokens of its sequence, under a
causal mask. So prefill, decoding and recomputing in the middle of a sequence are one call over the pool's own pages,
planned once per pass for each window and shape of layer.

Never run on a GPU by this project: how a pass is planned is checked with a stand-in that computes in torch from the
same arguments, and each device puts it to a self-test before it serves. FlashInfer splits long sequences by what else
is in the batch, so that results may differ in the last place with the neighbors, and it has no float32: answers equal
to those of a cold run are promised by the other back ends only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvcomm.errors import InvalidRequest
from kvcomm.model.attention import self_test
from kvcomm.model.attention.contract import AttentionStep, RunTable
from kvcomm.model.attention.triton_plan import RunArrays, flatten_runs
from kvcomm.model.optional import needing
from kvcomm.model.self_test import SelfTest

FLASHINFER_ATTENTION = SelfTest("attention back end 'flashinfer'", __name__, None)

TIMEOUT_S = 900.0
"""Of its self-test: without kernels built beforehand it compiles each of them with nvcc, for minutes."""

DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)
WORKSPACE_BYTES = 128 * 2**20
NO_WINDOW = -1


class Layout(NamedTuple):
    """What a plan holds for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    dtype: torch.dtype


@dataclass
class Planned:
    """A wrapper of FlashInfer, and the step whose pass it was planned for last."""

    wrapper: Any
    step: FlashInferStep | None = None


class FlashInferBackend:
    """Paged attention of FlashInfer; see the module docstring. Keeps a workspace and a wrapper for each layout.

    Raises:
        InvalidRequest: the package flashinfer is not installed.
    """

    def __init__(self) -> None:
        self._flashinfer = _load()
        self._workspace: Tensor | None = None
        self._planned: dict[Layout, Planned] = {}

    @property
    def name(self) -> str:
        return "flashinfer"

    def prepare(
        self, runs: Sequence[RunTable], keys: Sequence[Tensor], values: Sequence[Tensor], page_size: int
    ) -> AttentionStep:
        """Plan one pass; see `AttentionBackend.prepare`.

        Raises:
            InvalidRequest: device, dtype or heads that FlashInfer does not serve.
            ValueError: the runs do not fit their page tables or the pool.
        """
        for key, value in zip(keys, values, strict=True):
            _check_storage(key, value)
        arrays = flatten_runs(runs, page_size, keys[0].shape[0])
        return FlashInferStep(self, arrays, keys, values, page_size)

    def planned(self, layout: Layout, device: torch.device) -> Planned:
        """The wrapper of a layout; all of them share one workspace, since they run one after the other."""
        if layout not in self._planned:
            if self._workspace is None:
                self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            wrapper = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
            self._planned[layout] = Planned(wrapper)
        return self._planned[layout]


class FlashInferStep:
    """One pass. A layout is planned when its first layer comes, and again where another pass came between."""

    def __init__(
        self,
        backend: FlashInferBackend,
        runs: RunArrays,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        page_size: int,
    ) -> None:
        self._backend = backend
        self._runs = runs
        self._keys, self._values = keys, values
        self._page_size = page_size
        self._slots = torch.from_numpy(runs.slots).to(keys[0].device)
        self._pages = torch.from_numpy(runs.page_table).to(keys[0].device)

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
        """Write, then attend; see `AttentionStep`. Neither caps nor sinks: `require_plain_scores`."""
        require_plain_scores(softcap=softcap is not None, sinks=sinks is not None)
        keys, values = self._keys[layer_id], self._values[layer_id]
        keys.index_copy_(0, self._slots, key[0].transpose(0, 1))
        values.index_copy_(0, self._slots, value[0].transpose(0, 1))
        layout = Layout(query.shape[1], keys.shape[1], keys.shape[2], scale, sliding_window, query.dtype)
        planned = self._backend.planned(layout, keys.device)
        if planned.step is not self:
            self._plan(planned.wrapper, layout)
            planned.step = self
        pages = tuple(stored.view(-1, self._page_size, *stored.shape[1:]) for stored in (keys, values))
        out: Tensor = planned.wrapper.run(query[0].transpose(0, 1).contiguous(), pages)
        return out[None]

    def _plan(self, wrapper: Any, layout: Layout) -> None:
        num_pages = -(-self._runs.ends // self._page_size)
        wrapper.plan(
            # On the CPU, where FlashInfer wants to look at them.
            qo_indptr=_bounds(self._runs.ends - self._runs.starts),
            paged_kv_indptr=_bounds(num_pages),
            paged_kv_indices=self._pages,
            paged_kv_last_page_len=torch.from_numpy(
                (self._runs.ends - (num_pages - 1) * self._page_size).astype(np.int32)
            ),
            num_qo_heads=layout.num_heads,
            num_kv_heads=layout.num_kv_heads,
            head_dim_qk=layout.head_dim,
            page_size=self._page_size,
            causal=True,
            sm_scale=layout.scale,
            # A query sees so many keys to its left, and itself.
            window_left=NO_WINDOW if layout.window is None else layout.window - 1,
            q_data_type=layout.dtype,
            kv_data_type=layout.dtype,
        )


def examine(device: torch.device) -> None:
    """The self-test, in the dtypes and heads that it serves; see `self_test.examine`."""
    self_test.examine(device, FlashInferBackend(), dtypes=DTYPES, head_dims=HEAD_DIMS, plain_scores=True)


def require_plain_scores(*, softcap: bool, sinks: bool) -> None:
    """Raises InvalidRequest for scores that were never compared with this back end's."""
    asked = " and ".join(
        name for name, is_asked in (("caps its scores", softcap), ("has attention sinks", sinks)) if is_asked
    )
    if asked:
        raise InvalidRequest(
            f"attention back end 'flashinfer' serves plain scores only, and this model {asked}; choose 'auto'"
        )


def _bounds(counts: np.ndarray) -> Tensor:
    """[num_runs + 1] int32: where each of the concatenated pieces begins, and the end."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


def _load() -> ModuleType:
    refusal = (
        "attention back end 'flashinfer' needs the package flashinfer, which is not installed; "
        "pip install flashinfer-python, or choose the back end 'auto'"
    )
    with needing("flashinfer", refusal):
        import flashinfer
    return flashinfer  # type: ignore[no-any-return]


def _check_storage(keys: Tensor, values: Tensor) -> None:
    if keys.device.type not in DEVICES:
        raise InvalidRequest(f"attention back end 'flashinfer' needs a CUDA device, the page pool is on {keys.device}")
    if keys.dtype not in DTYPES:
        raise InvalidRequest(
            f"attention back end 'flashinfer' computes in bfloat16 and float16, not in {keys.dtype}; choose 'auto'"
        )
    if keys.shape != values.shape or keys.shape[2] not in HEAD_DIMS:
        raise InvalidRequest(
            f"attention back end 'flashinfer' serves heads of {', '.join(map(str, HEAD_DIMS))} channels, keys and "
            f"values alike; this model has {keys.shape[2]} and {values.shape[2]}; choose 'auto'"
        )
