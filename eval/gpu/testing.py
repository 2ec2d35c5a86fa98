"""Part `self_test`: the self-tests of the kernels, with nothing compiled before and then again.

What the first takes longer than the second is compiling.
"""

from __future__ import annotations

import os
import tempfile
import time
from argparse import Namespace
from importlib.util import find_spec

import torch

from eval.gpu.records import Recorder
from kvcomm.lab.kernels import TIMEOUT_S, TRITON_ATTENTION, TRITON_MOVES, in_a_process

TESTS = {"attention": TRITON_ATTENTION, "moves": TRITON_MOVES}


def measure(options: Namespace, record: Recorder) -> None:
    """Whether each passes: 1 or 0; if not, why; seconds of both runs."""
    if find_spec("triton") is None:
        record.skipped("triton is not installed")
        return
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # of this part's process and those that it starts
        for name, test in TESTS.items():
            for run in ("first", "again") if device.type == "cuda" else ("interpreted",):
                if record.is_over:
                    record.cut(f"the self-test of {name} ({run})")
                    return
                start = time.perf_counter()
                found = in_a_process(test.module, device, timeout_s=min(TIMEOUT_S, record.left_s))
                record.figure(f"self_test_{name}_{run}_s", time.perf_counter() - start, "s")
                if not found.passed:
                    record.failed(f"{test.subject}: {found.reason}")
            record.figure(f"self_test_{name}", float(found.passed), "passed", goal="1")
