"""Which implementation of the operations is used: chosen explicitly, never changed by an exception."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch

from kvcomm.align.ops import cpu, reference
from kvcomm.align.ops.contract import Align, Rotate
from kvcomm.align.ops.triton_launch import Mover
from kvcomm.errors import InvalidRequest
from kvcomm.model.attention import BackendInfo


class Ops(NamedTuple):
    """The operations of one implementation."""

    rotate: Rotate
    align: Align


def make_ops(name: str, device: torch.device | str) -> Ops:
    """The implementation called "cpu", "triton" or "reference".

    "auto" is "cpu" on the CPU, and elsewhere "triton" if that is installed, else "reference".

    Raises:
        InvalidRequest: unknown, not installed, or not for this device.
    """
    on_cpu = torch.device(device).type == "cpu"
    if name == "auto":
        name = "cpu" if on_cpu else "triton" if find_spec("triton") else "reference"
    if name == "cpu" and on_cpu:
        return Ops(cpu.rotate, cpu.align)
    if name == "reference":
        return Ops(reference.rotate, reference.align)
    if name == "triton":
        mover = Mover()
        mover.require(torch.device(device))
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
