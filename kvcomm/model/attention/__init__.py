"""Attention back ends and how one is chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvcomm.errors import InvalidRequest
from kvcomm.model.attention.contract import AttentionBackend, AttentionStep, RunTable

__all__ = [
    "AttentionBackend",
    "AttentionStep",
    "BackendInfo",
    "RunTable",
    "available_backends",
    "make_backend",
]

BACKEND_NAMES = ("torch", "triton")


class BackendInfo(NamedTuple):
    """Whether a back end runs on a device here, and why (not)."""

    name: str
    runs: bool
    reason: str


def available_backends(device: str | torch.device | None = None) -> list[BackendInfo]:
    """What each back end says about this machine; `device` defaults to CUDA where present, else the CPU."""
    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    return [BackendInfo("torch", True, f"runs on {target.type}"), _triton_info(target)]


def make_backend(name: str, device: str | torch.device) -> AttentionBackend:
    """Make a back end by name; "auto" takes Triton on CUDA and torch elsewhere.

    Raises:
        InvalidRequest: unknown name, or a back end that does not run on this device; says why.
    """
    infos = {info.name: info for info in available_backends(device)}
    if name == "auto":
        name = "triton" if torch.device(device).type == "cuda" and infos["triton"].runs else "torch"
    if name not in infos:
        raise InvalidRequest(f"unknown attention back end {name!r}; choose auto, {' or '.join(BACKEND_NAMES)}")
    if not infos[name].runs:
        raise InvalidRequest(f"attention back end {name!r} does not run here: {infos[name].reason}")
    if name == "triton":
        from kvcomm.model.attention.triton import TritonBackend

        return TritonBackend()
    from kvcomm.model.attention.torch_backend import TorchBackend

    return TorchBackend()


def _triton_info(device: torch.device) -> BackendInfo:
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return BackendInfo("triton", False, "triton is not installed: pip install 'kvcomm[triton]'")
    if device.type != "cuda":
        return BackendInfo("triton", False, f"needs a CUDA device, this is {device.type}")
    return BackendInfo("triton", True, "runs on cuda")
