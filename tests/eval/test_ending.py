"""A run that is told to end gives everything back, and a process that is killed leaves no files behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from eval.ending import ended_in_order, temporary_files_in
from tests.limits import PATIENCE_S

HELD = (
    "import tempfile, time\nfrom eval.ending import ended_in_order\n"
    "with ended_in_order(), tempfile.TemporaryDirectory() as folder:\n"
    "    print(folder, flush=True)\n    time.sleep(600)"
)
KILLED = "import os, signal, tempfile\nprint(tempfile.mkdtemp(), flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"


def test_whoever_is_told_to_end_removes_its_folder(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", HELD], stdout=subprocess.PIPE, text=True, env=environment) as running:
        assert running.stdout is not None
        folder = Path(running.stdout.readline().strip())
        assert folder.parent == tmp_path
        assert folder.is_dir()
        running.send_signal(signal.SIGTERM)
        assert running.wait(PATIENCE_S) == 1
    assert not folder.exists()


def test_the_handler_before_is_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit), ended_in_order():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_killed_process_leaves_lies_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    given = temporary_files_in(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, env={**os.environ, **given}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert Path(done.stdout.strip()).parent == tmp_path
    assert Path(given["TORCHINDUCTOR_CACHE_DIR"]).parent == Path(tempfile.gettempdir())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert temporary_files_in(tmp_path)["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
