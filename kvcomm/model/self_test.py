"""Whether kernels compute what they should on this very device, looked at before "auto" takes them.

A self-test runs in a process of its own. So a kernel that never ends is stopped, one that reads foreign memory takes
nothing with it, and memory of the device is free again afterwards. It runs once per process and device. A pass is kept
in the user's cache folder, under all that it depends on; whatever failed is looked at again by the next process, since
it may have been a missing compiler or a full device.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomm.files.reading import TEXT_BYTES, read_text
from kvcomm.files.writing import replacing
from kvcomm.model.cache_folder import cache_root

logger = logging.getLogger("kvcomm.engine")

TIMEOUT_S = 120.0
"""After which a self-test has failed; compiling all kernels takes the most of it."""

CHILD = "import sys; from kvcomm.model.self_test import examine_here; examine_here(*sys.argv[1:])"

ULPS = {torch.float32: 64, torch.float16: 2, torch.bfloat16: 2}
"""By how many units in the last place of the largest operand a result may differ from float64.

In half precision the softmax's weights and the result are rounded, half a unit each at best, and the interpreter cuts
results off, which costs one; in float32 sums of up to a thousand terms come in another order.
"""


class KernelsDiffer(Exception):
    """A kernel computed something else than it should; the message says in which case, and by how much."""


class Verdict(NamedTuple):
    """Whether kernels passed, and what is to be said about it."""

    passed: bool
    reason: str


@dataclass(frozen=True)
class SelfTest:
    """What is looked at.

    Attributes:
        subject: what it is called in messages, such as "attention back end 'triton'".
        module: has a function `examine(device: torch.device) -> None` that raises what is wrong.
        instead: what "auto" takes where it fails; None: it never takes these.
    """

    subject: str
    module: str
    instead: str | None


_verdicts: dict[tuple[SelfTest, str], Verdict] = {}
_verdicts_lock = threading.Lock()
"""A device belongs to the whole process, and so does what is known about it."""


def verdict(test: SelfTest, device: torch.device, *, timeout_s: float = TIMEOUT_S) -> Verdict:
    """What a self-test says about a device; whoever asks meanwhile waits for the first one's answer.

    Args:
        timeout_s: seconds that the first one waits at most.
    """
    with _verdicts_lock:
        key = (test, str(_indexed(device)))
        if key not in _verdicts:
            _verdicts[key] = found = _look(test, _indexed(device), timeout_s)
            if not found.passed and test.instead is not None:
                logger.warning("%s: %s; 'auto' takes %r", test.subject, found.reason, test.instead)
        return _verdicts[key]


def examine_here(module: str, device: str) -> None:
    """What the process of a self-test does: examine, and print the verdict as one JSON object."""
    try:
        import_module(module).examine(torch.device(device))
    except Exception as error:  # whatever a compiler or a driver raises: that is what is asked
        found = Verdict(False, described(error))
    else:
        found = Verdict(True, "passed")
    sys.stdout.write("\n" + json.dumps(found._asdict()) + "\n")


def described(error: Exception) -> str:
    """An error in one line; its type is named unless it says all by itself."""
    line = _one_line(str(error))
    return line if isinstance(error, KernelsDiffer) else f"{type(error).__name__}: {line}"


def require_close(what: str, found: Tensor, truth: Tensor, *, largest: float) -> None:
    """Hold a result against float64, element by element.

    Args:
        what: for the message.
        found: any dtype in `ULPS`, any device; what is not finite differs.
        truth: the same shape, float64, on the CPU.
        largest: magnitude of the operands whose rounding the result carries.

    Raises:
        KernelsDiffer: shapes differ, or a difference exceeds `ULPS` units of `largest`.
    """
    if found.shape != truth.shape:
        raise KernelsDiffer(f"{what}: the shape is {tuple(found.shape)}, not {tuple(truth.shape)}")
    error = (found.cpu().double() - truth).abs()
    allowed = ULPS[found.dtype] * torch.finfo(found.dtype).eps * largest
    num_wrong = int((~(error <= allowed)).sum())  # NaN is not at most anything
    if num_wrong:
        most = float(error.nan_to_num(float("inf")).max())
        raise KernelsDiffer(
            f"{what}: {num_wrong} of {error.numel()} numbers differ, by up to {most:.3g}; {allowed:.3g} is allowed"
        )


def require_same_bits(what: str, found: Tensor, expected: Tensor) -> None:
    """Raises KernelsDiffer unless two tensors of one dtype hold the same bits, NaN included."""
    bits = torch.int32 if expected.element_size() == 4 else torch.int16
    same = found.contiguous().view(bits) == expected.contiguous().view(bits)
    if not bool(same.all()):
        raise KernelsDiffer(
            f"{what}: {int((~same).sum())} of {same.numel()} numbers are not those that should be there"
        )


def _look(test: SelfTest, device: torch.device, timeout_s: float) -> Verdict:
    identity = _identity(test, device)
    file = cache_root() / "self_tests" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
    try:
        if read_text(file, max_bytes=TEXT_BYTES) == identity:
            return Verdict(True, "passed its self-test here before")
    except (OSError, ValueError):
        pass  # none yet, or nothing that was written here
    logger.info("%s: looking once whether its kernels compute rightly on %s", test.subject, device)
    found = in_a_process(test.module, device, timeout_s=timeout_s)
    if not found.passed:
        return Verdict(False, f"its self-test on {_device_name(device)} failed: {found.reason}")
    try:
        with replacing(file) as temporary:
            temporary.write_text(identity, encoding="utf-8")
    except OSError:
        pass  # looked at again next time
    return Verdict(True, "passed its self-test")


def in_a_process(module: str, device: torch.device, *, timeout_s: float) -> Verdict:
    """The verdict of `module` in a process of its own, which is stopped after `timeout_s` seconds."""
    paths = [path or os.getcwd() for path in sys.path]
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", CHILD, module, str(device)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return Verdict(False, f"it did not end within {timeout_s:g} s")
    finally:
        _stop(process)
    return _read(process.returncode, out, err)


def _stop(process: subprocess.Popen[str]) -> None:
    """End a process and the compilers it has started; one that a driver holds back is not waited for."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10.0)
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _read(returncode: int, out: str, err: str) -> Verdict:
    try:
        said = json.loads(out.strip().rpartition("\n")[2])
        return Verdict(said["passed"] is True, str(said["reason"]))
    except (ValueError, KeyError, TypeError):  # it ended before it could say anything
        ended = f"with signal {-returncode}" if returncode < 0 else f"with code {returncode}"
        return Verdict(
            False, f"its process ended {ended}: {_one_line(err.strip().rpartition(chr(10))[2]) or 'no word'}"
        )


def _identity(test: SelfTest, device: torch.device) -> str:
    """All that a pass depends on, as text."""
    found = import_module(test.module).__file__
    assert found is not None
    digest = hashlib.sha256()
    for source in sorted(Path(found).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    identity = {
        "module": test.module,
        "sources": digest.hexdigest(),
        "device": _device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": _version("triton"),
        "flashinfer": _version("flashinfer-python"),
        "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
    }
    return json.dumps(identity, sort_keys=True)


def _device_name(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        return str(device)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"


def _indexed(device: torch.device) -> torch.device:
    """The device with its number: "cuda" is the current one of them."""
    index: int | None = device.index
    if device.type != "cuda" or index is not None or not torch.cuda.is_available():
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _one_line(text: str, limit: int = 400) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
