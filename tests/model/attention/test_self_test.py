"""The self-test of the attention kernels, and what "auto" makes of it. What runs kernels gets a process of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from kvcomm.errors import InvalidRequest
from kvcomm.model.attention import available_backends, make_backend, preferred_backend
from kvcomm.model.attention.self_test import TRITON_ATTENTION, examine
from kvcomm.model.attention.torch_backend import TorchBackend
from kvcomm.model.self_test import SelfTest, Verdict, in_a_process
from tests.triton_process import run_cases

CASES = Path(__file__).with_name("self_test_cases.py")
WHY = "its self-test on a device failed: decode, float16: 3 of 8 numbers differ"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Self-tests fail; which devices were asked about."""
    devices: list[str] = []

    def failed(test: SelfTest, device: torch.device) -> Verdict:
        assert test == TRITON_ATTENTION
        devices.append(str(device))
        return Verdict(False, WHY)

    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr("kvcomm.model.self_test.verdict", failed)
    return devices


def test_mistakes_are_caught_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run_cases(CASES, interpret=True)


BROKEN = """
import re
from pathlib import Path
from kvcomm.model.attention import triton, triton_kernels
from kvcomm.model.attention.self_test import examine as examine_all
from tests.broken_kernels import Mistake, broken

def examine(device):
    mistake = Mistake("scale * LOG2_E", "-scale * LOG2_E")
    kernels = broken(Path(triton_kernels.__file__), mistake, Path(__file__).parent / "broken")
    triton._load_kernels = lambda: kernels
    examine_all(device)
"""


def test_the_process_that_examines_tells_of_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "examined_attention.py").write_text(BROKEN)
    found = in_a_process("examined_attention", torch.device("cpu"), timeout_s=600.0)
    assert not found.passed
    assert re.fullmatch(r"prefill, float32: the result: \d+ of \d+ .*; torch's back end is right there", found.reason)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_the_device_passes() -> None:
    assert in_a_process(TRITON_ATTENTION.module, torch.device("cuda"), timeout_s=120.0) == Verdict(True, "passed")


def test_the_torch_back_end_passes() -> None:
    """What the kernels are held against is what the other back end computes."""
    examine(torch.device("cpu"), TorchBackend())


def test_auto_takes_torch_where_the_kernels_fail(asked: list[str]) -> None:
    assert preferred_backend("cuda") == "triton"
    assert make_backend("auto", "cuda").name == "torch"
    assert set(asked) == {"cuda"}
    torchs, tritons, _ = available_backends("cuda")
    assert (torchs.runs, torchs.reason) == (True, "runs on cuda; auto takes it")
    assert (tritons.runs, tritons.reason) == (False, WHY)


def test_kernels_that_fail_are_refused(asked: list[str]) -> None:
    with pytest.raises(InvalidRequest, match=r"'triton' does not run here: its self-test on .* 3 of 8 numbers differ"):
        make_backend("triton", "cuda:1")
    assert asked == ["cuda:1"]


def test_auto_takes_kernels_that_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr("kvcomm.model.self_test.verdict", lambda test, device: Verdict(True, "passed its self-test"))
    assert make_backend("auto", "cuda").name == "triton"
    torchs, tritons, _ = available_backends("cuda")
    assert torchs.reason == "runs on cuda"
    assert tritons.reason == "runs on cuda; passed its self-test; auto takes it"


def test_nobody_waits_who_asks_for_torch(asked: list[str]) -> None:
    assert make_backend("torch", "cuda").name == "torch"
    assert asked == []


def test_nothing_is_examined_on_the_cpu(asked: list[str]) -> None:
    assert make_backend("auto", "cpu").name == "torch"
    assert preferred_backend("cpu") == "torch"
    assert asked == []
