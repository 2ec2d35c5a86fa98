"""The self-test of the moving kernel, and what "auto" makes of it. What runs the kernel gets a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvcomm.align.ops import cpu, reference
from kvcomm.align.ops.choice import available_ops, make_ops
from kvcomm.align.ops.contract import Ops
from kvcomm.align.ops.self_test import TRITON_MOVES, examine
from kvcomm.errors import InvalidRequest
from kvcomm.model.self_test import SelfTest, Verdict, in_a_process
from tests.triton_process import run_cases

CASES = Path(__file__).with_name("self_test_cases.py")
WHY = "its self-test on a device failed: halves, rotated, float32: keys of layer 0 differ"


def test_mistakes_are_caught_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run_cases(CASES, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_the_device_passes() -> None:
    assert in_a_process(TRITON_MOVES.module, torch.device("cuda"), timeout_s=120.0) == Verdict(True, "passed")


@pytest.mark.parametrize("ops", [Ops(cpu.rotate, cpu.align), Ops(reference.rotate, reference.align)])
def test_the_other_operations_pass(ops: Ops) -> None:
    """Float64 and complex numbers say the same as both of them."""
    examine(torch.device("cpu"), ops)


def test_auto_takes_others_where_the_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    asked: list[SelfTest] = []

    def failed(test: SelfTest, device: torch.device) -> Verdict:
        asked.append(test)
        return Verdict(False, WHY)

    monkeypatch.setattr("kvcomm.align.ops.choice.verdict", failed)
    assert make_ops("auto", "cpu").rotate is cpu.rotate
    assert asked == []
    assert make_ops("auto", "cuda").rotate is reference.rotate
    assert asked == [TRITON_MOVES]
    with pytest.raises(InvalidRequest, match=r"'triton' do not run on cuda: its self-test .* differ; choose 'auto'"):
        make_ops("triton", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    infos = {info.name: info for info in available_ops()}
    assert next(iter(infos)) == "reference"
    assert WHY in infos["triton"].reason


def test_auto_takes_a_kernel_that_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr("kvcomm.align.ops.choice.verdict", lambda test, device: Verdict(True, "passed"))
    assert make_ops("auto", "cuda").rotate.__module__.endswith("triton_launch")
