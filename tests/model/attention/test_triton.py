"""The Triton back end. What runs kernels stands in triton_cases.py and gets a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from kvcomm.errors import InvalidRequest
from tests.triton_process import run_cases, run_python

CASES = Path(__file__).with_name("triton_cases.py")

REFUSES_CPU = """
import sys
import numpy as np
import torch
from kvcomm.errors import InvalidRequest
from kvcomm.model.attention.contract import RunTable
from kvcomm.model.attention.triton import TritonBackend
assert "kvcomm.model.attention.triton_kernels" not in sys.modules, "importing the back end imported triton"
backend = TritonBackend()
assert backend.name == "triton"
cache = torch.zeros(4, 1, 16)
try:
    backend.prepare([RunTable(np.zeros(1, dtype=np.int32), 0, 1)], [cache], [cache], 4)
except InvalidRequest as error:
    print(error)
"""


def test_kernels_match_the_reference_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run_cases(CASES, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_kernels_match_the_reference_on_the_device() -> None:
    run_cases(CASES, interpret=False)


def test_import_is_light_and_a_cpu_pool_is_refused() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    result = run_python("-c", REFUSES_CPU, interpret=False)
    assert result.returncode == 0, result.stderr
    assert "attention back end 'triton' needs a CUDA or ROCm device, the page pool is on cpu" in result.stdout
    assert "'torch'" in result.stdout


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import kvcomm.model.attention as package
    from kvcomm.model.attention.triton import TritonBackend

    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kvcomm.model.attention.triton_kernels", raising=False)
    monkeypatch.delattr(package, "triton_kernels", raising=False)
    with pytest.raises(InvalidRequest, match=r"needs the package triton.*kvcomm\[triton\].*'torch'"):
        TritonBackend()
