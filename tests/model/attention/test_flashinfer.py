"""How passes are planned for FlashInfer, with a stand-in that computes in torch from the same arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcomm.errors import InvalidRequest
from kvcomm.model.attention import available_backends, flashinfer, make_backend
from kvcomm.model.attention.contract import RunTable
from kvcomm.model.attention.flashinfer import FlashInferBackend, examine
from kvcomm.model.geometry import LayerGeometry
from kvcomm.model.self_test import KernelsDiffer, SelfTest, Verdict

CPU = torch.device("cpu")

Change = Callable[[dict[str, Any]], None]


class Wrapper:
    """What FlashInfer's documentation says of `BatchPrefillWithPagedKVCacheWrapper`, slowly.

    Row i of a request with q rows and k keys sees the keys up to k - q + i, and of those no more than `window_left`
    before the last one.
    """

    num_plans = 0
    change: Change = staticmethod(lambda plan: None)

    def __init__(self, workspace: Tensor, kv_layout: str) -> None:
        assert (workspace.dtype, kv_layout) == (torch.uint8, "NHD")

    def plan(self, **plan: Any) -> None:
        Wrapper.num_plans += 1
        Wrapper.change(plan)
        self.given = plan

    def run(self, query: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        plan = self.given
        assert query.is_contiguous()
        assert query.dtype == plan["q_data_type"] == plan["kv_data_type"] == pages[0].dtype
        assert pages[0].shape[1:] == (plan["page_size"], plan["num_kv_heads"], plan["head_dim_qk"])
        rows, bounds = plan["qo_indptr"].tolist(), plan["paged_kv_indptr"].tolist()
        out = torch.full_like(query, torch.nan)
        for request, last in enumerate(plan["paged_kv_last_page_len"].tolist()):
            assert 1 <= last <= plan["page_size"]
            table = plan["paged_kv_indices"][bounds[request] : bounds[request + 1]].long()
            num_keys = (len(table) - 1) * plan["page_size"] + last
            keys, values = (each[table].flatten(0, 1)[:num_keys].float() for each in pages)
            own = slice(rows[request], rows[request + 1])
            out[own] = self._attend(query[own].float(), keys, values).to(query.dtype)
        return out

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        group = self.given["num_qo_heads"] // self.given["num_kv_heads"]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        last = torch.arange(len(query))[:, None] + len(keys) - len(query)
        seen = torch.arange(len(keys))[None]
        hidden = (seen > last) if self.given["causal"] else torch.zeros(1, 1, dtype=torch.bool)
        if self.given["window_left"] >= 0:
            hidden = hidden | (seen < last - self.given["window_left"])
        scores = torch.einsum("qhd,khd->hqk", query, keys) * self.given["sm_scale"]
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(Wrapper, "num_plans", 0)


def test_all_passes_of_the_self_test() -> None:
    """Prefill, decoding, runs in the middle, windows, grouped heads; pages permuted, unused slots NaN."""
    examine(CPU)
    assert Wrapper.num_plans > 20


def changed(name: str, value: Callable[[Any], Any]) -> Change:
    def change(plan: dict[str, Any]) -> None:
        plan[name] = value(plan[name])

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed("causal", lambda causal: False),
        changed("window_left", lambda left: left + 1 if left >= 0 else left),
        changed("sm_scale", lambda scale: -scale),
        changed("paged_kv_indices", lambda pages: pages.flip(0)),
        changed("paged_kv_last_page_len", lambda lengths: (lengths - 1).clamp(1)),
    ],
)
def test_a_plan_with_a_mistake_is_caught(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wrapper, "change", staticmethod(change))
    with pytest.raises(KernelsDiffer, match="torch's back end is right there"):
        examine(CPU)


def tensors(num_tokens: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    query, key, value = (torch.randn(1, heads, num_tokens, 64, generator=generator) for heads in (4, 2, 2))
    return query.to(dtype), key.to(dtype), value.to(dtype)


def test_a_layout_is_planned_once_for_all_layers_and_again_after_another_pass() -> None:
    backend = FlashInferBackend()
    pools = [[torch.zeros(64, 2, 64, dtype=torch.float16) for _ in range(3)] for _ in range(2)]
    first = backend.prepare([RunTable(np.array([0, 1], dtype=np.int32), 0, 20)], *pools, 16)
    second = backend.prepare([RunTable(np.array([2, 3], dtype=np.int32), 0, 17)], *pools, 16)
    for layer_id in range(3):
        first(layer_id, *tensors(20), scale=0.1, sliding_window=None)
    assert Wrapper.num_plans == 1
    expected = first(0, *tensors(20), scale=0.1, sliding_window=None)
    first(1, *tensors(20), scale=0.1, sliding_window=4)
    assert Wrapper.num_plans == 2
    second(0, *tensors(17), scale=0.1, sliding_window=None)
    assert torch.equal(first(0, *tensors(20), scale=0.1, sliding_window=None), expected)
    assert Wrapper.num_plans == 4


@pytest.mark.parametrize(
    ("dims", "dtype", "message"),
    [
        ((64, 64), torch.float32, r"computes in bfloat16 and float16, not in torch.float32; choose 'auto'"),
        ((80, 80), torch.float16, r"heads of 64, 128, 256 channels.* this model has 80 and 80"),
        ((128, 64), torch.float16, r"this model has 128 and 64"),
    ],
)
def test_what_it_does_not_serve_is_refused(dims: tuple[int, int], dtype: torch.dtype, message: str) -> None:
    keys, values = (torch.zeros(16, 1, dim, dtype=dtype) for dim in dims)
    with pytest.raises(InvalidRequest, match=message):
        FlashInferBackend().prepare([RunTable(np.zeros(1, dtype=np.int32), 0, 1)], [keys], [values], 16)


def test_scores_of_another_form_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LayerGeometry(4, 2, 64, 64, 0.1, None, None)
    monkeypatch.setattr("kvcomm.model.self_test.verdict", lambda *_, **__: Verdict(True, "passed"))
    monkeypatch.setattr("kvcomm.model.attention._is_installed", lambda package: True)
    assert make_backend("flashinfer", "cuda", [plain]).name == "flashinfer"
    message = r"'flashinfer' serves plain scores only, and this model caps its scores; choose 'auto'"
    with pytest.raises(InvalidRequest, match=message):
        make_backend("flashinfer", "cuda", [plain, replace(plain, softcap=50.0)])
    with pytest.raises(InvalidRequest, match="and this model has attention sinks"):
        make_backend("flashinfer", "cuda", [replace(plain, has_sinks=True)])
    stored = torch.zeros(16, 2, 64, dtype=torch.float16)
    step = FlashInferBackend().prepare([RunTable(np.zeros(1, dtype=np.int32), 0, 3)], [stored], [stored], 16)
    with pytest.raises(InvalidRequest, match="has attention sinks"):
        step(0, *tensors(3), scale=0.1, sliding_window=None, sinks=torch.zeros(4))


def test_a_pool_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer, "DEVICES", ("cuda",))
    stored = torch.zeros(16, 1, 64, dtype=torch.float16)
    with pytest.raises(InvalidRequest, match="needs a CUDA device, the page pool is on cpu"):
        FlashInferBackend().prepare([RunTable(np.zeros(1, dtype=np.int32), 0, 1)], [stored], [stored], 16)


def test_it_is_taken_only_where_it_is_asked_for_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"flashinfer": Verdict(True, "passed its self-test"), "triton": Verdict(False, "differs")}

    def verdict(test: SelfTest, device: torch.device, **settings: float) -> Verdict:
        return found["flashinfer" if "flashinfer" in test.subject else "triton"]

    monkeypatch.setattr("kvcomm.model.self_test.verdict", verdict)
    monkeypatch.setattr("kvcomm.model.attention._is_installed", lambda package: True)
    assert make_backend("auto", "cuda").name == "torch"
    assert make_backend("flashinfer", "cuda").name == "flashinfer"
    found["flashinfer"] = Verdict(False, "its self-test on it failed")
    with pytest.raises(InvalidRequest, match="'flashinfer' does not run here: its self-test on it failed"):
        make_backend("flashinfer", "cuda")


def test_nobody_waits_for_its_self_test_who_does_not_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def verdict(test: SelfTest, device: torch.device, **settings: float) -> Verdict:
        asked.append(test.subject)
        return Verdict(True, "passed")

    monkeypatch.setattr("kvcomm.model.self_test.verdict", verdict)
    monkeypatch.setattr("kvcomm.model.attention._is_installed", lambda package: True)
    (info,) = (info for info in available_backends("cuda") if info.name == "flashinfer")
    assert info.runs
    assert info.reason == "installed; taken only where it is asked for, after a self-test"
    assert set(asked) == {"attention back end 'triton'"}


def test_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcomm.model.attention._is_installed", lambda package: False)
    with pytest.raises(InvalidRequest, match=r"does not run here: flashinfer is not installed"):
        make_backend("flashinfer", "cuda")
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(InvalidRequest, match=r"needs the package flashinfer.*choose the back end 'auto'"):
        FlashInferBackend()
