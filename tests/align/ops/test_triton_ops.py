"""The Triton operations. What runs the kernel stands in triton_cases.py and gets a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from kvcomm.align.ops.choice import make_ops
from kvcomm.align.ops.triton_shapes import BLOCK_ELEMENTS, RowKind
from kvcomm.errors import InvalidRequest
from tests.triton_process import run_cases, run_python

CASES = Path(__file__).with_name("triton_cases.py")

REFUSES_CPU = """
import sys
from kvcomm.align.ops.choice import make_ops
from kvcomm.errors import InvalidRequest
assert "triton" not in sys.modules, "importing the operations imported triton"
assert make_ops("auto", "cpu").align.__module__.endswith("cpu")
try:
    make_ops("triton", "cpu")
except InvalidRequest as error:
    print(error)
"""


def test_the_kernel_matches_the_reference_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run_cases(CASES, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_the_kernel_matches_the_reference_on_the_device() -> None:
    run_cases(CASES, interpret=False)


def test_import_is_light_and_the_cpu_is_refused() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    result = run_python("-c", REFUSES_CPU, interpret=False)
    assert result.returncode == 0, result.stderr
    assert "'triton' do not run on cpu: they need a CUDA or ROCm device; choose 'auto'" in result.stdout


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import kvcomm.align.ops as package

    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kvcomm.align.ops.triton_kernels", raising=False)
    monkeypatch.delattr(package, "triton_kernels", raising=False)
    with pytest.raises(InvalidRequest, match=r"needs? the package triton.*kvcomm\[triton\].*'auto'"):
        make_ops("triton", "cuda")


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("rotary", [0, 16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_tiles_hold_every_channel_and_fit(dim: int, rotary: int, interleaved: bool) -> None:
    kind = RowKind(dim, rotary, interleaved and rotary > 0, 8)
    constants = kind.constants()
    assert rotary + constants["BLOCK_REST"] >= dim
    assert 2 * constants["BLOCK_HALF"] >= rotary
    assert constants["BLOCK_TOKENS"] * kind.widest_tile == BLOCK_ELEMENTS


def test_bytes_of_a_token() -> None:
    # Read and written: 64 channels of 2 bytes, two slots; 8 anchors of 64 codes, a scale, an index and a weight.
    assert RowKind(64, 64, False, 8).token_bytes(2) == 2 * 128 + 16 + 8 * 76
    assert RowKind(64, 0, False, 0).token_bytes(4) == 2 * 256 + 16
