"""Attention back ends and how one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvcomm.errors import InvalidRequest
from kvcomm.model.attention.contract import AttentionBackend, AttentionStep, RunTable

if TYPE_CHECKING:
    from kvcomm.model.geometry import LayerGeometry

__all__ = [
    "AttentionBackend",
    "AttentionStep",
    "BackendInfo",
    "RunTable",
    "available_backends",
    "make_backend",
    "preferred_backend",
]

BACKEND_NAMES = ("torch", "triton", "flashinfer")


class BackendInfo(NamedTuple):
    """Whether a back end runs on a device here, and why (not)."""

    name: str
    runs: bool
    reason: str


def available_backends(device: str | torch.device | None = None) -> list[BackendInfo]:
    """What each back end says about this machine; `device` defaults to CUDA where present, else the CPU.

    On CUDA the Triton kernels are put to their self-test, once per process and device; see `kvcomm.model.self_test`.
    """
    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    taken = _auto(target)
    infos = [_info(name, target) for name in BACKEND_NAMES]
    return [info._replace(reason=f"{info.reason}; auto takes it") if info.name == taken else info for info in infos]


def preferred_backend(device: str | torch.device) -> str:
    """What "auto" takes on a device where nothing fails its self-test, which is not run."""
    return "triton" if torch.device(device).type == "cuda" and _is_installed("triton") else "torch"


def make_backend(name: str, device: str | torch.device, layers: Sequence[LayerGeometry] = ()) -> AttentionBackend:
    """Make a back end by name; "auto" takes Triton on CUDA where it passes its self-test, and torch elsewhere.

    Args:
        layers: that it will attend in.

    Raises:
        InvalidRequest: unknown name, a back end that does not run on this device or fails there, or one that cannot
            score as these layers do; says why.
    """
    target = torch.device(device)
    if name == "auto":
        name = _auto(target)
    if name not in BACKEND_NAMES:
        raise InvalidRequest(f"unknown attention back end {name!r}; choose auto, {' or '.join(BACKEND_NAMES)}")
    info = _info(name, target)
    if not info.runs:
        raise InvalidRequest(f"attention back end {name!r} does not run here: {info.reason}")
    if name == "flashinfer":
        return _tested_flashinfer(target, layers)
    if name == "triton":
        from kvcomm.model.attention.triton import TritonBackend

        return TritonBackend()
    from kvcomm.model.attention.torch_backend import TorchBackend

    return TorchBackend()


def _auto(device: torch.device) -> str:
    preferred = preferred_backend(device)
    return preferred if _info(preferred, device).runs else "torch"


def _info(name: str, device: torch.device) -> BackendInfo:
    """What one back end says; asking the Triton one on CUDA puts its kernels to their self-test."""
    if name == "triton":
        return _triton_info(device)
    if name == "flashinfer":
        return _flashinfer_info(device)
    return BackendInfo("torch", True, f"runs on {device.type}")


def _triton_info(device: torch.device) -> BackendInfo:
    if not _is_installed("triton"):
        return BackendInfo("triton", False, "triton is not installed: pip install 'kvcomm[triton]'")
    if device.type != "cuda":
        return BackendInfo("triton", False, f"needs a CUDA device, this is {device.type}")
    from kvcomm.model.attention.self_test import TRITON_ATTENTION
    from kvcomm.model.self_test import verdict

    found = verdict(TRITON_ATTENTION, device)
    return BackendInfo("triton", found.passed, f"runs on cuda; {found.reason}" if found.passed else found.reason)


def _flashinfer_info(device: torch.device) -> BackendInfo:
    if not _is_installed("flashinfer"):
        return BackendInfo("flashinfer", False, "flashinfer is not installed: pip install flashinfer-python")
    if device.type != "cuda":
        return BackendInfo("flashinfer", False, f"needs a CUDA device, this is {device.type}")
    return BackendInfo("flashinfer", True, "installed; taken only where it is asked for, after a self-test")


def _tested_flashinfer(device: torch.device, layers: Sequence[LayerGeometry]) -> AttentionBackend:
    from kvcomm.model.attention import flashinfer
    from kvcomm.model.self_test import verdict

    flashinfer.require_plain_scores(
        softcap=any(layer.softcap is not None for layer in layers), sinks=any(layer.has_sinks for layer in layers)
    )
    found = verdict(flashinfer.FLASHINFER_ATTENTION, device, timeout_s=flashinfer.TIMEOUT_S)
    if not found.passed:
        raise InvalidRequest(f"attention back end 'flashinfer' does not run here: {found.reason}")
    return flashinfer.FlashInferBackend()


def _is_installed(package: str) -> bool:
    return find_spec(package) is not None
