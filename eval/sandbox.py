"""Running programs that a model wrote, so that whatever they do ends with them.

A program gets a Python process of its own: an empty environment, an empty folder, limits on memory, CPU time and files,
no other processes, no sockets, no files but its own and Python's. Where the system allows it (`unshare` of util-linux,
Linux user namespaces) it also gets its own network, without devices, its own process ids, which all die with it, and a
file system on which nothing but a small folder in memory can be written. `isolation()` says which of the two it is. It
stands up to careless and rude programs; it is no fortress against somebody who knows the kernel's weak spots.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

GUARD = Path(__file__).with_name("sandbox_guard.py")
MAX_OUTPUT = 10_000
"""Bytes of the program's output that are kept, from its end."""
_PREPARE = """
mount --make-rprivate / || exit 1
while read -r _ place _; do
    for flags in "" ,nosuid,nodev ,nosuid,nodev,noexec; do
        mount -o "remount,bind,ro$flags" "$place" && break
    done
done < /proc/self/mounts 2> /dev/null
mount -t tmpfs -o size=32m,mode=700 tmpfs "$0" && cd "$0" || exit 1
"$@"
exit $?
"""
"""Shell: every mount becomes read-only, all but a new one in memory on the program's folder, which comes first.

The shell stays as process 1: with it all others end, and signals that end the program do not pass it by.
"""


class Limits(NamedTuple):
    """Of one program: seconds by the clock and of CPU, bytes of memory and of any file."""

    seconds: float = 10.0
    cpu_s: int = 10
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20


class Verdict(NamedTuple):
    """How a program ended.

    Attributes:
        passed: it ran to its end without an error.
        reason: "passed", "timeout", or the last line that it wrote.
        output: the end of what it wrote.
    """

    passed: bool
    reason: str
    output: str


def run_program(program: str, limits: Limits | None = None) -> Verdict:
    """Run a program to its end, or to its limits."""
    limits = limits or Limits()
    token = secrets.token_hex(16)
    reading, writing = os.pipe()
    given = {"program": program, "limits": limits._asdict(), "token": token, "report": writing}
    with tempfile.TemporaryDirectory(prefix="kvcomm-sandbox-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            _command(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={},
            cwd=folder,
            start_new_session=True,
            pass_fds=(writing,),
        )
        os.close(writing)
        try:
            output, is_late = _follow(process, json.dumps(given).encode(), limits.seconds)
        finally:
            _kill(process)
            said = _read_all(reading)
    if said == token.encode() and not is_late:
        return Verdict(True, "passed", output)
    lines = output.strip().splitlines()
    reason = "timeout" if is_late else lines[-1][:200] if lines else f"exit status {process.returncode}"
    return Verdict(False, reason, output)


@cache
def isolation() -> str:
    """ "namespaces", or "limits" where the system has no user namespaces for us."""
    with tempfile.TemporaryDirectory(prefix="kvcomm-sandbox-") as folder:
        return "namespaces" if _works(_namespaces(folder)) else "limits"


def _command(folder: str) -> list[str]:
    wrapper = _namespaces(folder) if isolation() == "namespaces" else []
    return [*wrapper, sys.executable, "-I", "-S", "-B", "-c", GUARD.read_text()]


def _namespaces(folder: str) -> list[str]:
    shared = ["--user", "--map-root-user", "--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child"]
    return ["/usr/bin/unshare", *shared, "/bin/sh", "-c", _PREPARE, folder]


def _works(command: list[str]) -> bool:
    try:
        tried = subprocess.run(
            [*command, sys.executable, "-I", "-S", "-c", ""], env={}, capture_output=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return tried.returncode == 0


def _follow(process: subprocess.Popen[bytes], given: bytes, seconds: float) -> tuple[str, bool]:
    """Feed the program and keep the end of its output; whether it took too long."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(OSError):  # it ended before it read: its output says why
        process.stdin.write(given)
        process.stdin.close()
    deadline = time.monotonic() + seconds
    kept = b""
    os.set_blocking(process.stdout.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if selector.select(min(left, 0.05)):
                chunk = process.stdout.read(1 << 16)
                if chunk == b"":
                    break
                kept = (kept + (chunk or b""))[-MAX_OUTPUT:]
            elif process.poll() is not None:
                break
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return kept.decode(errors="replace"), True
    return kept.decode(errors="replace"), False


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The program and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()


def _read_all(reading: int) -> bytes:
    os.set_blocking(reading, False)
    try:
        return os.read(reading, 1 << 10)
    except BlockingIOError:
        return b""
    finally:
        os.close(reading)
