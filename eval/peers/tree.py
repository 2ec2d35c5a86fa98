"""A server and all processes that come from it: what they cost, what they hold, and that none is left behind.

The server begins a session of its own, so processes whose parents have gone are still found. Linux only: everything
comes from /proc and from the processor clocks of processes.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from kvcomm.errors import ServerError

PROC = Path("/proc")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
BORN = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("whoever started this has gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Becomes a command, after asking to be killed when its parent ends.

Asking between fork and exec (`preexec_fn`) would need room for a second copy of all memory of the parent.
"""
END_S = 10.0
"""To end by itself, before it is killed."""
QUIET_SHARE = 0.05
"""Of one core: below it a tree is idle."""
LOOK_S = 0.25


class _Stat(NamedTuple):
    """Of one process, from /proc/PID/stat; `waited_s` is of its ended children."""

    pid: int
    parent: int
    session: int
    is_zombie: bool
    own_s: float
    waited_s: float


class ProcessTree:
    """Runs a command from construction to the end of the `with` block; its output goes to a file.

    Attributes:
        pid: of the first process, and of the session of all of them.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Start it; raises FileNotFoundError where there is no such command."""
        if shutil.which(command[0], path=environment.get("PATH")) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), command[0])
        self._log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", BORN, str(os.getpid()), *command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the first process has not ended."""
        return self._process.poll() is None

    def log_tail(self, num_chars: int = 2000) -> str:
        """The end of what it has written."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-num_chars:].strip()

    def pids(self) -> list[int]:
        """Of all living processes of the tree."""
        return [each.pid for each in self._members()]

    def cpu_s(self) -> float:
        """Seconds of the processor since the start, of processes that have ended as well.

        Exact to nanoseconds for living processes, to the system's tick for those that have ended.
        """
        return sum(_own_cpu_s(each) + each.waited_s for each in self._members(with_zombies=True))

    def memory_bytes(self) -> int:
        """Resident memory; pages that several processes share count once (PSS), where the system says so."""
        return sum(map(_memory_bytes, self.pids()))

    def settle(self, limit_s: float) -> bool:
        """Wait until it has nothing to do, for so long at most; whether it came to rest."""
        end, before = time.monotonic() + limit_s, self.cpu_s()
        while time.monotonic() < end:
            start = time.monotonic()
            time.sleep(LOOK_S)
            now = self.cpu_s()
            if now - before < QUIET_SHARE * (time.monotonic() - start):
                return True
            before = now
        return False

    def idle_share(self, seconds: float) -> float:
        """Of one core, that it takes while nobody asks anything."""
        before, start = self.cpu_s(), time.monotonic()
        time.sleep(seconds)
        return (self.cpu_s() - before) / (time.monotonic() - start)

    def pause(self) -> None:
        """Let no process of it run until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run on."""
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """Ask it to end; kill what is left."""
        self.resume()
        if self.is_running:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        # As long as the first process is not waited for, nobody else can have its number.
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._signal(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def require_running(self) -> None:
        """Raises ServerError, with what it wrote last, where it has ended."""
        if not self.is_running:
            raise ServerError(f"the server ended with code {self._process.returncode}: {self.log_tail()}")

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _members(self, *, with_zombies: bool = False) -> list[_Stat]:
        found = {each.pid: each for each in _all_stats()}
        belongs: set[int] = {pid for pid, each in found.items() if self.pid in (pid, each.session)}
        while more := {pid for pid, each in found.items() if each.parent in belongs} - belongs:
            belongs |= more
        return [found[pid] for pid in sorted(belongs) if with_zombies or not found[pid].is_zombie]


def _all_stats() -> list[_Stat]:
    stats = (_stat(int(each.name)) for each in PROC.iterdir() if each.name.isdigit())
    return [each for each in stats if each is not None]


def _stat(pid: int) -> _Stat | None:
    """None: it has gone."""
    try:
        line = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = line.rpartition(")")[2].split()  # behind the name, which may hold anything
    own, waited = (sum(map(int, fields[at : at + 2])) * TICK_S for at in (11, 13))
    return _Stat(pid, int(fields[1]), int(fields[3]), fields[0] == "Z", own, waited)


def _own_cpu_s(stat: _Stat) -> float:
    """By the process's own clock, else in ticks."""
    try:
        return max(stat.own_s, time.clock_gettime(~stat.pid << 3 | 2))
    except OSError:
        return stat.own_s


def _memory_bytes(pid: int) -> int:
    for file, name in (("smaps_rollup", "Pss:"), ("status", "VmRSS:")):
        with suppress(OSError):
            for line in (PROC / str(pid) / file).read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith(name):
                    return int(line.split()[1]) * 1024
    return 0
