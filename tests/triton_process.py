"""Running Triton tests in a process of their own.

Triton decides at its first import whether kernels are interpreted, so the interpreter must not reach other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_python(*arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def run_cases(cases: Path, *, interpret: bool) -> None:
    """Run a file of tests; fails with its output unless all of it passes and nothing is skipped."""
    result = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases), interpret=interpret)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout
