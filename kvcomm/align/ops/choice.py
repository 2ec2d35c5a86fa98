"""Which implementation of the operations is used: chosen explicitly, never changed by an exception."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from kvcomm.align.ops import cpu, reference
from kvcomm.align.ops.contract import Ops
from kvcomm.align.ops.triton_launch import Mover
from kvcomm.errors import InvalidRequest
from kvcomm.model.attention import BackendInfo
from kvcomm.model.self_test import Verdict, verdict


def make_ops(name: str, device: torch.device | str) -> Ops:
    """The implementation called "cpu", "triton" or "reference".

    "auto" is "cpu" on the CPU, and elsewhere "triton" if that is installed and passes its self-test, else "reference".

    Raises:
        InvalidRequest: unknown, not installed, not for this device, or it failed its self-test there.
    """
    on_cpu = torch.device(device).type == "cpu"
    if name == "auto":
        takes_triton = not on_cpu and find_spec("triton") is not None and _tested(torch.device(device)).passed
        name = "cpu" if on_cpu else "triton" if takes_triton else "reference"
    if name == "cpu" and on_cpu:
        return Ops(cpu.rotate, cpu.align)
    if name == "reference":
        return Ops(reference.rotate, reference.align)
    if name == "triton":
        mover = Mover()
        mover.require(torch.device(device))
        found = _tested(torch.device(device))
        if not found.passed:
            raise InvalidRequest(
                f"the operations called 'triton' do not run on {device}: {found.reason}; choose 'auto'"
            )
        return Ops(mover.rotate, mover.align)
    if name == "cpu":
        raise InvalidRequest(f"the operations called 'cpu' do not run on {device}; choose 'reference' or 'auto'")
    raise InvalidRequest(f"unknown operations {name!r}; there are auto, cpu, triton, reference")


def available_ops() -> list[BackendInfo]:
    """What every implementation says about CUDA where present, else the CPU; the one that "auto" takes comes first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for name in ("cpu", "triton", "reference"):
        try:
            make_ops(name, device)
        except InvalidRequest as error:
            found.append(BackendInfo(name, False, str(error)))
        else:
            found.append(BackendInfo(name, True, ""))
    chosen = next(info for info in found if info.runs)
    return [chosen._replace(reason="default"), *(info for info in found if info is not chosen)]


def _tested(device: torch.device) -> Verdict:
    """What the self-test says; the interpreter, which runs kernels on CPU tensors, is for tests and has none."""
    if device.type == "cpu":
        return Verdict(True, "interpreted")
    from kvcomm.align.ops.self_test import TRITON_MOVES

    return verdict(TRITON_MOVES, device)
