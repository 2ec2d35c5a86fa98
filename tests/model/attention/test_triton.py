"""The Triton back end. What runs kernels stands in triton_cases.py and gets a process of its own.

Triton decides at its first import whether kernels are interpreted, so the interpreter must not reach other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvcomm.errors import InvalidRequest

ROOT = Path(__file__).parents[3]
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


def run_python(*arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def run_cases(*, interpret: bool) -> None:
    result = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES), interpret=interpret)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout


def test_kernels_match_the_reference_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run_cases(interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_kernels_match_the_reference_on_the_device() -> None:
    run_cases(interpret=False)


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
