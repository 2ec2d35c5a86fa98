"""The sandbox against programs that mean harm: each fails, for the guard's reason, and nothing of it is left.

Everything is tried twice: with namespaces, where the system has them, and with limits and hook alone.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from eval import sandbox
from eval.sandbox import Limits, run_program

SHORT = Limits(seconds=60.0, cpu_s=2, memory_bytes=1 << 28)
"""On a busy machine processor time passes slowly: its limit has to be what ends programs, not the clock."""
HASTY = SHORT._replace(seconds=3.0)
"""For programs that only wait."""
HAS_NAMESPACES = sandbox.isolation() == "namespaces"


@pytest.fixture(params=["namespaces", "limits"])
def isolation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "namespaces" and not HAS_NAMESPACES:
        pytest.skip("no user namespaces here")
    monkeypatch.setattr(sandbox, "isolation", lambda: request.param)
    return str(request.param)


@pytest.fixture
def bare_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hook taken away, as by a program that got round it; gives a mark on the command line of its processes."""
    mark = f"mark of {tmp_path.name} {os.getpid()}"
    guarded = sandbox.GUARD.read_text()
    bare = guarded.replace("    sys.addaudithook(hook)\n", "    del hook\n").replace("delattr(module, name)", "pass")
    assert bare.count("pass\n") > guarded.count("pass\n")
    assert "addaudithook" not in bare
    file = tmp_path / "guard.py"
    file.write_text(f"{bare}\n# {mark}\n")
    monkeypatch.setattr(sandbox, "GUARD", file)
    return mark


def test_an_honest_program_passes(isolation: str) -> None:
    verdict = run_program("import math\nassert math.sqrt(16) == 4\nprint('fine')", SHORT)
    assert verdict.passed
    assert verdict.output == "fine\n"


def test_what_solutions_use_is_there(isolation: str) -> None:
    program = """
import collections, copy, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq, itertools, json, random
import re, statistics, string, sys, typing

sys.setrecursionlimit(20_000)

@dataclasses.dataclass
class Pair:
    one: int

def depth(n):
    return 0 if n == 0 else 1 + depth(n - 1)

assert depth(5000) == 5000
assert Pair(1) == Pair(random.randint(1, 1))
assert hashlib.md5(b"").hexdigest().startswith("d41d")
open("own", "w").write("x")
assert open("own").read() == "x"
"""
    assert run_program(program, SHORT).reason == "passed"


NOT_PASSING = {
    "wrong": ("assert 1 == 2, 'wrong'", "AssertionError: wrong"),
    "no program": ("def f(:", "SyntaxError"),
    "leaves early": ("import sys\nsys.exit(0)", "exit status 0"),
    "leaves at once": ("import os\nos._exit(0)", "exit status 0"),
    "says it passed": ("print('passed')\nraise SystemExit", "passed"),
    "asks": ("input()", "ValueError"),
}
# Where the guard fails, these harm little: signal 0 kills nobody, files are small and few.
HOSTILE = {
    "computes for ever": ("while True: pass", "exit status|Killed"),
    "sleeps": ("import time\ntime.sleep(1000)", "timeout"),
    "takes memory": ("x = 'a' * (1 << 30)", "MemoryError"),
    "forks": ("import os\nfor _ in range(8): os.fork()", "os.fork is not allowed"),
    "starts programs": ("import subprocess\nsubprocess.run(['/bin/true'])", "not allowed"),
    "starts processes": ("import multiprocessing\nmultiprocessing.Process(target=print).start()", "not allowed"),
    "becomes another": ("import os\nos.execv('/bin/true', ['true'])", "os.exec is not allowed"),
    "kills its parent": ("import os\nos.kill(os.getppid(), 0)", "os.kill is not allowed"),
    "kills everybody": ("import os\nos.kill(-1, 0)", "os.kill is not allowed"),
    "kills by handle": (
        "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
        "AttributeError",
    ),
    "opens sockets": ("import socket\nsocket.socket()", "importing _socket is not allowed"),
    "calls C": ("import ctypes", "not allowed"),
    "reads the environment": (f"open('/proc/{os.getpid()}/environ').read()", "may be read"),
    "reads foreign files": ("open('/etc/passwd').read()", "may be read"),
    "writes elsewhere": ("open('/var/../tmp/kvcomm-escaped', 'w')", "nothing else"),
    "writes through a folder": (
        "import os\nfd = os.open('/tmp', os.O_RDONLY)\nos.open('kvcomm-escaped', 65, dir_fd=fd)",
        "may be read",
    ),
    "writes a database": ("import sqlite3\nsqlite3.connect('/tmp/kvcomm-escaped')", "not allowed"),
    "removes": ("import os\nos.remove('/tmp/kvcomm-escaped')", "os.remove is not allowed"),
    "removes folders": ("import shutil\nshutil.rmtree('/tmp/kvcomm-escaped')", "shutil.rmtree is not allowed"),
    "lifts its limits": ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "not allowed"),
    "changes the guard": ("import __main__\n__main__.DENIED = ()\nimport os\nos.fork()", "os.fork is not allowed"),
    "fills the disk, many files": ("for i in range(1000): open(f'f{i}', 'wb').write(b'x' * 1000)", "a few files"),
    "fills the disk, one file": (
        "f = open('f', 'wb')\nfor _ in range(64): f.write(b'x' * (1 << 20))",
        "exit status|OSError",
    ),
}


@pytest.mark.parametrize("name", NOT_PASSING)
def test_what_does_not_come_to_its_end_has_not_passed(name: str, isolation: str) -> None:
    program, reason = NOT_PASSING[name]
    verdict = run_program(program, SHORT)
    assert not verdict.passed
    assert reason in verdict.reason


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_fail_for_the_guards_reason(name: str, isolation: str) -> None:
    program, reasons = HOSTILE[name]
    verdict = run_program(program, HASTY if name == "sleeps" else SHORT)
    assert not verdict.passed
    assert any(reason in verdict.reason for reason in reasons.split("|")), verdict


def test_megabytes_of_output_are_cut(isolation: str) -> None:
    verdict = run_program("for _ in range(20_000): print('x' * 1000)\nprint('end')", Limits(seconds=60))
    assert verdict.passed
    assert len(verdict.output) == sandbox.MAX_OUTPUT
    assert verdict.output.endswith("end\n")


def test_output_without_end_does_not_keep_the_run(isolation: str) -> None:
    verdict = run_program("while True: print('x' * 1000)", HASTY)
    assert not verdict.passed
    assert len(verdict.output) <= sandbox.MAX_OUTPUT


def test_the_token_is_in_no_frame(isolation: str) -> None:
    """A program that looks through the frames below it, to write the token itself, finds none."""
    program = """
try:
    1 / 0
except ZeroDivisionError as error:
    frame, seen = error.__traceback__.tb_frame, []
    while frame is not None:
        seen += [str(value) for value in frame.f_locals.values()]
        seen += list(frame.f_locals)
        frame = frame.f_back
print(*seen)
"""
    output = run_program(program, SHORT).output
    assert "module" in output
    assert "token" not in output


def test_files_in_the_current_folder_are_gone_afterwards(isolation: str) -> None:
    verdict = run_program("import os\nopen('a', 'w').write('x')\nprint(os.getcwd())", SHORT)
    assert verdict.passed
    assert not Path(verdict.output.strip()).exists()
    assert not (Path.cwd() / "a").exists()


def test_nothing_of_the_environment_is_seen(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    verdict = run_program("import os\nprint(sorted(os.environ))", SHORT)
    assert verdict.passed
    assert "SECRET" not in verdict.output
    assert "PATH" not in verdict.output


@pytest.mark.skipif(not HAS_NAMESPACES, reason="no user namespaces here")
def test_what_gets_round_the_hook_meets_the_namespaces(bare_guard: str, tmp_path: Path) -> None:
    """The kernel still keeps files, processes and the network apart."""
    victim = tmp_path / "victim"
    victim.write_text("alive")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 5).close()  # from here it can be reached
        programs = {
            f"open({str(victim)!r}, 'w')": "Read-only file system",
            f"import os\nos.remove({str(victim)!r})": "Read-only file system",
            f"import os\nos.kill({os.getpid()}, 9)": "ProcessLookupError",
            f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)": "OSError|unreachable",
            "f = [open(f'f{i}', 'wb') for i in range(50)]\n"
            "for each in f: each.write(b'x' * (1 << 20)); each.flush()": "No space left",
        }
        for program, reasons in programs.items():
            verdict = run_program(program, SHORT)
            assert not verdict.passed
            assert any(reason in verdict.reason for reason in reasons.split("|")), verdict
    assert victim.read_text() == "alive"


def test_what_gets_round_the_hook_meets_the_limits(isolation: str, bare_guard: str) -> None:
    assert "MemoryError" in run_program("x = bytearray(1 << 30)", SHORT).reason
    assert run_program("while True: pass", SHORT).reason.startswith(("exit status", "Killed"))
    assert run_program("f = open('f', 'wb')\nfor _ in range(64): f.write(b'x' * (1 << 20))", SHORT).passed is False


def test_background_children_end_with_the_program(isolation: str, bare_guard: str) -> None:
    """Of a program that ends while its child sleeps, and of one that waits for it."""
    started = "import os, time\nif os.fork() == 0:\n    time.sleep(600)"
    assert run_program(started, HASTY).reason in ("passed", "timeout")
    assert run_program(f"{started}\nelse:\n    time.sleep(600)", HASTY).reason == "timeout"
    assert are_gone(bare_guard)


@pytest.mark.skipif(not HAS_NAMESPACES, reason="no user namespaces here")
def test_children_with_a_session_of_their_own_end_too(bare_guard: str) -> None:
    """Killing the group of the program does not reach those; its own process ids do."""
    started = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)"
    assert run_program(started, HASTY).reason in ("passed", "timeout")
    assert are_gone(bare_guard)


def are_gone(mark: str) -> bool:
    """Whether processes with a mark end; killed ones are seen for a moment still."""
    return any(not processes(mark) or time.sleep(0.05) for _ in range(100))


def processes(mark: str) -> list[Path]:
    """Living processes with a mark on their command line."""
    return [each for each in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in _read(each)]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""
