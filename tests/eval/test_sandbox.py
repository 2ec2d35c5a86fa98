"""The sandbox against programs that mean harm: each fails, and nothing of it is left."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from eval.sandbox import Limits, isolation, run_program

SHORT = Limits(seconds=4.0, cpu_s=2, memory_bytes=1 << 28)


def test_an_honest_program_passes() -> None:
    verdict = run_program("import math\nassert math.sqrt(16) == 4\nprint('fine')", SHORT)
    assert verdict.passed
    assert verdict.output == "fine\n"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'wrong'", "AssertionError: wrong"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "exit status 0"),
        ("import os\nos._exit(0)", "exit status 0"),
        ("raise SystemExit", "exit status 0"),
        ("while True: pass", ""),
        ("import time\ntime.sleep(1000)", "timeout"),
        ("input()", "ValueError"),
        ("x = 'a' * (1 << 30)", "MemoryError"),
        ("import os\nwhile True: os.fork()", "PermissionError"),
        ("import subprocess\nsubprocess.run(['/bin/true'])", "PermissionError"),
        ("import multiprocessing\nmultiprocessing.Process(target=print).start()", "PermissionError"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
        ("import os\nos.kill(-1, 9)", "PermissionError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 80))", "PermissionError"),
        ("import ctypes", "PermissionError"),
        ("open('/etc/kvcomm', 'w')", "PermissionError"),
        ("import os\nos.remove('/etc/hostname')", "PermissionError"),
        ("import shutil\nshutil.rmtree('/tmp')", "PermissionError"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "PermissionError"),
    ],
)
def test_hostile_programs_fail(program: str, reason: str) -> None:
    verdict = run_program(program, SHORT)
    assert not verdict.passed
    assert reason in verdict.reason


def test_megabytes_of_output_are_cut() -> None:
    verdict = run_program("while True: print('x' * 1000)", SHORT)
    assert not verdict.passed
    assert len(verdict.output) <= 10_000


def test_output_does_not_stand_for_passing() -> None:
    assert not run_program("print('passed')\nraise SystemExit", SHORT).passed


def test_the_disk_cannot_be_filled() -> None:
    many = "for i in range(100000):\n    open(f'f{i}', 'wb').write(b'x' * (1 << 19))"
    assert "PermissionError" in run_program(many, SHORT).reason
    large = "f = open('f', 'wb')\nwhile True:\n    f.write(b'x' * (1 << 20))"
    assert not run_program(large, SHORT).passed


def test_files_in_the_current_folder_are_fine_and_gone_afterwards() -> None:
    assert run_program("open('a', 'w').write('x')\nassert open('a').read() == 'x'", SHORT).passed
    assert not (Path.cwd() / "a").exists()


def test_nothing_of_the_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert run_program("import os\nassert 'SECRET' not in os.environ", SHORT).passed


def test_what_gets_round_the_hook_meets_the_namespaces(tmp_path: Path) -> None:
    """The hook taken away by hand: the kernel still keeps files, processes and the network apart."""
    if isolation() != "namespaces":
        pytest.skip("no user namespaces here")
    from eval import sandbox

    guarded = sandbox.GUARD.read_text()
    bare = guarded.replace("    sys.addaudithook(hook)\n", "    del hook\n")
    assert bare != guarded
    victim = tmp_path / "victim"
    victim.write_text("alive")
    stem = f"kvcomm-{os.getpid()}"
    programs = [
        f"open({str(victim)!r}, 'w')",
        f"import os\nos.kill({os.getpid()}, 9)",
        "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)",
        f"open('/var/{stem}', 'w')",
    ]
    with pytest.MonkeyPatch.context() as patched:
        file = tmp_path / "guard.py"
        file.write_text(bare)
        patched.setattr(sandbox, "GUARD", file)
        for program in programs:
            assert not run_program(program, SHORT).passed, program
        left = run_program("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)", SHORT)
        assert left.reason in ("timeout", "passed")
    assert victim.read_text() == "alive"
    time.sleep(0.2)
    assert not [each for each in Path("/proc").glob("[0-9]*/cmdline") if b"sandbox_guard" in _read(each)]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""
