"""What tests start does not outlive them, whatever becomes of them."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from tests import limits
from tests.limits import process, threads, wait_for

SLEEPER = [sys.executable, "-c", "import time; time.sleep(3600)"]


def test_a_process_ends_with_the_test_that_failed() -> None:
    with pytest.raises(AssertionError, match="broken"), process(SLEEPER) as child:
        raise AssertionError("broken")
    assert child.poll() is not None


def test_a_process_that_has_ended_keeps_its_code() -> None:
    with process([sys.executable, "-c", "raise SystemExit(3)"], stdout=subprocess.PIPE) as child:
        child.communicate(timeout=limits.PATIENCE_S)
    assert child.returncode == 3


def test_threads_are_waited_for_when_a_test_fails() -> None:
    go_on, done = threading.Event(), list[int]()

    def work() -> None:
        assert go_on.wait(limits.PATIENCE_S)
        done.append(1)

    with pytest.raises(AssertionError, match="broken"), threads(work, go_on.set, work):
        raise AssertionError("broken")
    assert done == [1, 1]


def test_what_never_happens_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PATIENCE_S", 0.01)
    with pytest.raises(AssertionError, match="it did not happen"):
        wait_for(lambda: False)
