"""The self-test of the attention kernels in the interpreter; collected only by test_self_test.py, in its own process.

Right kernels pass, and each kernel with one mistake is caught.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvcomm.model.attention import triton_kernels
from kvcomm.model.attention.self_test import examine
from kvcomm.model.self_test import KernelsDiffer
from tests.broken_kernels import COMPILES_NOT, Mistake, broken

CPU = torch.device("cpu")
SOURCE = Path(triton_kernels.__file__)

SCORES = 'scores = tl.where(visible, scores, -float("inf"))'
MISTAKES = {
    "a sign": Mistake("scores = scores * log2_scale", "scores = scores * -log2_scale"),
    "another cap": Mistake("scores = (softcap * LOG2_E)", "scores = 1.001 * (softcap * LOG2_E)"),
    "a window one too wide": Mistake(
        "> row_positions[:, None] - sliding_window", ">= row_positions[:, None] - sliding_window"
    ),
    "a look at the next token": Mistake(
        "last_seen = tl.minimum(row_positions", "last_seen = tl.minimum(row_positions + 1"
    ),
    "no look at the own token": Mistake(
        "positions[None, :] <= last_seen[:, None]", "positions[None, :] < last_seen[:, None]"
    ),
    "another slot of the page": Mistake("+ positions % PAGE_SIZE", "+ (PAGE_SIZE - 1 - positions % PAGE_SIZE)"),
    "another head": Mistake("key_cache_ptr + kv_head * key_stride_head", "key_cache_ptr + 0 * key_stride_head"),
    "sums that are not rescaled": Mistake("value, total * rescale[:, None],", "value, total,"),
    "parts weighted wrongly": Mistake("(part_lse - largest) * LOG2_E", "(part_lse - largest)"),
    "a part left out": Mistake("is_part = parts < num_parts", "is_part = parts < num_parts - 1"),
    "values in a neighboring slot": Mistake(
        "slots[:, None] * value_cache_stride_slot", "(slots[:, None] ^ 1) * value_cache_stride_slot"
    ),
    "a key that is not written": Mistake("in_range = tokens < num_tokens", "in_range = tokens < num_tokens - 1"),
    "products of too few bits": Mistake("query = tl.load(", "query = 0.999 * tl.load("),
    "rows of another token": Mistake(
        "row_positions = run_start + row_tokens", "row_positions = run_start + row_tokens // 2"
    ),
}


def load(monkeypatch: pytest.MonkeyPatch, mistake: Mistake, folder: Path) -> None:
    kernels = broken(SOURCE, mistake, folder)
    monkeypatch.setattr("kvcomm.model.attention.triton._load_kernels", lambda: kernels)


def test_right_kernels_pass() -> None:
    examine(CPU)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_caught(mistake: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, mistake, tmp_path)
    with pytest.raises(KernelsDiffer, match=r"torch's back end is right there"):
        examine(CPU)


def test_the_case_that_differs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, MISTAKES["a window one too wide"], tmp_path)
    with pytest.raises(
        KernelsDiffer, match=r"^prefill, float32, window 6: the result: \d+ of \d+ numbers differ, by up to"
    ):
        examine(CPU)
    load(monkeypatch, MISTAKES["parts weighted wrongly"], tmp_path)
    with pytest.raises(KernelsDiffer, match=r"^decode, float32: the result: "):
        examine(CPU)
    load(monkeypatch, MISTAKES["values in a neighboring slot"], tmp_path)
    with pytest.raises(KernelsDiffer, match=r"^prefill, float32: values in the pool: \d+ of"):
        examine(CPU)


def test_a_kernel_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, Mistake(SCORES, COMPILES_NOT), tmp_path)
    with pytest.raises(KernelsDiffer, match=r"^prefill, float32: \w+: .*no such instruction.*torch's .* is right"):
        examine(CPU)
