"""The self-test of the moving kernel in the interpreter; collected only by test_self_test.py, in its own process.

The right kernel passes, and each one with a mistake is caught.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvcomm.align.ops import triton_kernels
from kvcomm.align.ops.self_test import examine
from kvcomm.model.self_test import KernelsDiffer
from tests.broken_kernels import COMPILES_NOT, Mistake, broken

CPU = torch.device("cpu")
SOURCE = Path(triton_kernels.__file__)

MISTAKES = {
    "a sign": Mistake("first * move_cos - second * move_sin", "first * move_cos + second * move_sin"),
    "a sign of offsets": Mistake("added_second * place_cos + added_first", "added_second * place_cos - added_first"),
    "offsets at another position": Mistake("place_cos = tl.load(place, ", "place_cos = tl.load(place + 1, "),
    "halves for neighbors": Mistake("if ROPE == HALVES:", "if ROPE != NO_ROPE:"),
    "no scale": Mistake(" * tl.load(scales + row, mask=is_token, other=0.0)", ""),
    "neighbors of another group": Mistake("tl.load(groups_ptr + layer)", "tl.load(groups_ptr)"),
    "rotation of another layer": Mistake("tl.load(ropes_ptr + layer)", "tl.load(ropes_ptr)"),
    "another slot": Mistake(
        "tl.load(targets_ptr + tokens, mask=is_token, other=0)",
        "(1 ^ tl.load(targets_ptr + tokens, mask=is_token, other=0))",
    ),
    "channels left as they were": Mistake(
        "is_rest = is_token[:, None] & (rest < DIM)", "is_rest = is_token[:, None] & (rest < DIM - 1)"
    ),
}


def load(monkeypatch: pytest.MonkeyPatch, mistake: Mistake, folder: Path) -> None:
    kernels = broken(SOURCE, mistake, folder)
    monkeypatch.setattr("kvcomm.align.ops.triton_launch._load_kernels", lambda: kernels)


def test_the_right_kernel_passes() -> None:
    examine(CPU)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_caught(mistake: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, mistake, tmp_path)
    with pytest.raises(KernelsDiffer, match=r"'reference' is right there"):
        examine(CPU)


def test_the_case_that_differs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, MISTAKES["a sign of offsets"], tmp_path)
    with pytest.raises(KernelsDiffer, match=r"^halves, corrected, float32: keys of layer 1: \d+ of"):
        examine(CPU)


def test_a_kernel_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, Mistake("new_second = second * move_cos + first * move_sin", COMPILES_NOT), tmp_path)
    with pytest.raises(KernelsDiffer, match=r"^halves, rotated, .*no such instruction"):
        examine(CPU)
