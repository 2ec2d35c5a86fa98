"""`eval.peers.tree` on real processes: what they cost is counted wherever they are, and none is left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval.peers.tree import ProcessTree
from kvcomm.errors import ServerError
from tests.limits import wait_for

SPIN = "import time\nwhile time.process_time() < {}: pass\n"
WAIT = "import threading; threading.Event().wait()"
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAIT


def tree(tmp_path: Path, program: str) -> ProcessTree:
    return ProcessTree([sys.executable, "-c", program], os.environ, tmp_path / "log")


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def is_gone(pid: int) -> bool:
    try:
        return state(pid) == "Z"
    except FileNotFoundError:
        return True


def child(program: str) -> str:
    """A program that starts another one."""
    return f"import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {program!r}])\n"


def test_its_own_work_counts(tmp_path: Path) -> None:
    with tree(tmp_path, SPIN.format(0.3) + WAIT) as running:
        wait_for(lambda: running.settle(5.0) and running.cpu_s() >= 0.3)
        assert running.cpu_s() < 2  # and nobody else's


def test_a_child_that_has_ended_counts(tmp_path: Path) -> None:
    with tree(tmp_path, child(SPIN.format(0.5)) + "child.wait()\nprint('waited', flush=True)\n" + WAIT) as running:
        wait_for(lambda: "waited" in running.log_tail())
        assert running.cpu_s() >= 0.5
        assert running.pids() == [running.pid]


def test_a_child_whose_parent_has_ended_counts_and_is_ended(tmp_path: Path) -> None:
    middle = child(SPIN.format(0.4) + STUBBORN)
    with tree(tmp_path, child(middle) + "child.wait()\nprint('orphaned', flush=True)\n" + WAIT) as running:
        wait_for(lambda: "orphaned" in running.log_tail())
        wait_for(lambda: running.cpu_s() >= 0.4)
        first, orphan = running.pids()
        assert first == running.pid
    wait_for(lambda: is_gone(first) and is_gone(orphan))


def test_whoever_will_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.peers.tree.END_S", 0.1)
    with tree(tmp_path, "print('up', flush=True)\n" + STUBBORN) as running:
        wait_for(lambda: "up" in running.log_tail())
    assert not running.is_running


def test_a_paused_tree_does_nothing_and_can_be_ended(tmp_path: Path) -> None:
    with tree(tmp_path, "while True: pass") as running:
        wait_for(lambda: running.cpu_s() > 0.05)
        assert running.idle_share(0.2) > 0.01
        running.pause()
        wait_for(lambda: state(running.pid) == "T")
        wait_for(lambda: running.idle_share(0.2) == 0)
        assert running.settle(5.0)
        running.resume()
        wait_for(lambda: running.idle_share(0.2) > 0.01)
        wait_for(lambda: not running.settle(0.1))
        running.pause()


def test_memory_is_what_it_holds(tmp_path: Path) -> None:
    with tree(tmp_path, "held = b'1' * 50_000_000\nprint('holds', flush=True)\n" + WAIT) as running:
        wait_for(lambda: "holds" in running.log_tail())
        assert 50e6 < running.memory_bytes() < 90e6


def test_it_says_why_it_has_ended(tmp_path: Path) -> None:
    with tree(tmp_path, "import sys\nprint('no room')\nsys.exit(7)") as running:
        wait_for(lambda: not running.is_running)
        with pytest.raises(ServerError, match="ended with code 7: no room"):
            running.require_running()


def test_a_command_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such file or directory: 'no-such-command'"):
        ProcessTree(["no-such-command"], os.environ, tmp_path / "log")


def test_whoever_starts_it_may_hold_more_addresses_than_there_is_memory(tmp_path: Path) -> None:
    """As a process does that has made several pools: a copy of it would be refused."""
    program = (
        "import mmap, os, sys\nfrom pathlib import Path\nfrom eval.peers.tree import ProcessTree\n"
        "size = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') * 6 // 10\n"
        "held = [mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(4)]\n"
        f"with ProcessTree([sys.executable, '-c', {WAIT!r}], os.environ, Path({str(tmp_path / 'log')!r})) as tree:\n"
        "    print(tree.is_running)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


def test_a_killed_parent_takes_it_along(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom eval.peers.tree import ProcessTree\n"
        f"tree = ProcessTree([sys.executable, '-c', {WAIT!r}], os.environ, Path({str(tmp_path / 'log')!r}))\n"
        "print(tree.pid, flush=True)\n" + WAIT
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not is_gone(pid)
        parent.kill()
    wait_for(lambda: is_gone(pid))
