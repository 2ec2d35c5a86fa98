"""The script runs as users run it; its checks are also seen to fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MOVES = ("keys", "keys rotated only", "interleaved keys", "values")

pytest.importorskip("triton", reason="triton is not installed")


def run_script(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "scripts" / "compile_kernels.py"), *options]
    env = {**inherited, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def variants(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    found = json.loads(result.stdout)["variants"]
    assert isinstance(found, list)
    return found


def test_reports_what_the_compiler_made() -> None:
    result = run_script("--target", "sm_90", "--kernel", "write_kv", "--dtype", "bf16", "--head-dim", "64", "--json")
    assert result.returncode == 0, result.stderr
    (report,) = variants(result)
    assert report["variant"]["kernel"] == "write_kv"
    assert 0 < report["registers"] <= 255
    assert report["spills"] == 0
    assert report["loads"]["vector"] >= report["min_vector"] > 0
    assert report["problems"] == []


def test_narrow_loads_fail() -> None:
    """Strides that are not known to be multiples of 16 leave nothing but narrow loads."""
    options = ("--target", "sm_90", "--kernel", "write_kv", "--dtype", "bf16", "--head-dim", "64", "--unaligned")
    result = run_script(*options, "--json")
    assert result.returncode == 1
    (report,) = variants(result)
    assert report["loads"]["vector"] == 0
    assert [text for text in report["problems"] if "vector" in text] == ["0 vector loads, 4 meant"]


def test_offsets_are_loaded_whole_or_it_fails() -> None:
    options = ("--target", "sm_90", "--kernel", "move_rows", "--dtype", "bf16", "--head-dim", "64", "--json")
    clean, unaligned = run_script(*options), run_script(*options, "--unaligned")
    assert clean.returncode == 0, clean.stdout
    assert [report["variant"]["tiles"] for report in variants(clean)] == list(MOVES)
    assert variants(clean)[0]["token_bytes"] == 2 * 128 + 16 + 8 * 76
    assert unaligned.returncode == 1
    assert all(report["problems"] for report in variants(unaligned))


def test_interpreter_mode_is_refused() -> None:
    result = run_script("--json", TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr


@pytest.mark.slow
def test_spills_fail() -> None:
    options = ("--target", "sm_80", "--kernel", "attend", "--dtype", "fp16", "--head-dim", "128")
    result = run_script(*options, "--max-registers", "64", "--json")
    assert result.returncode == 1
    assert any("spills" in text for report in variants(result) for text in report["problems"])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_all_variants_of_a_target_are_clean(target: str) -> None:
    result = run_script("--target", target, "--json")
    reports = variants(result)
    assert result.returncode == 0, [(report["label"], report["problems"]) for report in reports]
    # Two head sizes; per dtype write and merge, what is moved, and wide and narrow tiles without a window, with one,
    # and with a cap as well; parts for two dtypes.
    assert len(reports) == 2 * (3 * (2 + 6 + len(MOVES)) + 2 * 3)
    assert {report["variant"]["target"] for report in reports} == {target}
