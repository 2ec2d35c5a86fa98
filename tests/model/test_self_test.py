"""Self-tests of kernels: what ends their process, what is kept, who waits. Here they examine nothing but themselves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvcomm.model import self_test
from kvcomm.model.self_test import (
    KernelsDiffer,
    SelfTest,
    Verdict,
    described,
    in_a_process,
    require_close,
    require_same_bits,
    verdict,
)

CPU = torch.device("cpu")

MODULES = {
    "passes": "print('noise')",
    "differs": "raise KernelsDiffer('decode, float32: 3 of 4 numbers differ')",
    "raises": "raise RuntimeError('no\\n  compiler')",
    "crashes": "os.abort()",
    "leaves": "sys.stderr.write('nothing to be done\\n'); os._exit(3)",
    "hangs": "threading.Event().wait()",
}
HEAD = "import os, sys, threading\nfrom kvcomm.model.self_test import KernelsDiffer\ndef examine(device):\n    "

Make = Callable[[str], SelfTest]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Self-tests whose `examine` does that; nothing is known about them yet."""
    monkeypatch.setattr(self_test, "_verdicts", {})
    monkeypatch.setenv("KVCOMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)

    def made(name: str) -> SelfTest:
        (tmp_path / f"examined_{name}.py").write_text(f"{HEAD}{MODULES[name]}\n")
        return SelfTest(f"kernel {name!r}", f"examined_{name}", "torch")

    return made


@pytest.mark.parametrize(
    ("name", "passed", "reason"),
    [
        ("passes", True, "passed"),
        ("differs", False, "decode, float32: 3 of 4 numbers differ"),
        ("raises", False, "RuntimeError: no compiler"),
        ("crashes", False, "its process ended with signal 6: "),
        ("leaves", False, "its process ended with code 3: nothing to be done"),
    ],
)
def test_what_a_process_says(make: Make, name: str, passed: bool, reason: str) -> None:
    found = in_a_process(make(name).module, CPU, timeout_s=600.0)
    assert found.passed is passed
    assert found.reason.startswith(reason)


def test_one_that_never_ends_is_stopped(make: Make) -> None:
    assert in_a_process(make("hangs").module, CPU, timeout_s=0.5) == Verdict(False, "it did not end within 0.5 s")


class Processes:
    """Counts the processes that would be started, and answers for them."""

    def __init__(self, *answers: Verdict) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def __call__(self, module: str, device: torch.device, *, timeout_s: float) -> Verdict:
        self.asked.append(module)
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_verdicts", {})


def test_a_pass_is_kept_under_all_it_depends_on(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    test, processes = make("passes"), Processes(Verdict(True, "passed"))
    monkeypatch.setattr(self_test, "in_a_process", processes)
    assert verdict(test, CPU) == verdict(test, CPU) == Verdict(True, "passed its self-test")
    assert len(processes.asked) == 1
    new_process(monkeypatch)
    assert verdict(test, CPU) == Verdict(True, "passed its self-test here before")
    assert len(processes.asked) == 1

    (file,) = (tmp_path / "cache" / "self_tests").iterdir()
    for damaged in (b"", b"{}", b"\xff\xfe", file.read_bytes()[:-1], b"[" * 100_000):
        file.write_bytes(damaged)
        new_process(monkeypatch)
        assert verdict(test, CPU).reason == "passed its self-test"
    assert len(processes.asked) == 6

    (tmp_path / "examined_passes.py").write_text(HEAD + "pass")
    new_process(monkeypatch)
    assert verdict(test, CPU).reason == "passed its self-test"
    monkeypatch.setattr(self_test, "_version", lambda package: "9.9")
    new_process(monkeypatch)
    assert verdict(test, CPU).reason == "passed its self-test"
    assert len(processes.asked) == 8


def test_a_failure_is_told_once_and_not_kept(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    test = make("differs")
    processes = Processes(Verdict(False, "no compiler"), Verdict(True, "passed"))
    monkeypatch.setattr(self_test, "in_a_process", processes)
    with caplog.at_level(logging.WARNING, "kvcomm.engine"):
        assert verdict(test, CPU) == verdict(test, CPU) == Verdict(False, "its self-test on cpu failed: no compiler")
    (told,) = caplog.messages
    assert told == "kernel 'differs': its self-test on cpu failed: no compiler; 'auto' takes 'torch'"
    new_process(monkeypatch)
    assert verdict(test, CPU).passed


def test_a_cache_that_cannot_be_written_is_done_without(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVCOMM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(self_test, "in_a_process", Processes(Verdict(True, "passed")))
    assert verdict(make("passes"), CPU).passed


def test_threads_share_one_process(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    test, asked, found = make("passes"), [], []
    everybody_waits = threading.Barrier(4)

    def slow(module: str, device: torch.device, *, timeout_s: float) -> Verdict:
        asked.append(module)
        return Verdict(False, f"answer {len(asked)}")

    monkeypatch.setattr(self_test, "in_a_process", slow)

    def ask() -> None:
        everybody_waits.wait()
        found.append(verdict(test, CPU))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1
    assert found == [Verdict(False, "its self-test on cpu failed: answer 1")] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_close_at_the_limit_and_past_it(dtype: torch.dtype) -> None:
    allowed = self_test.ULPS[dtype] * torch.finfo(dtype).eps
    truth = torch.tensor([1.0, 0.0], dtype=torch.float64)
    require_close("x", torch.tensor([1.0 + allowed, allowed], dtype=dtype), truth, largest=1.0)
    with pytest.raises(KernelsDiffer, match=r"^x: 1 of 2 numbers differ, by up to .*; .* is allowed"):
        require_close("x", torch.tensor([1.0 + 2 * allowed, 0.0], dtype=dtype), truth, largest=1.0)
    require_close("x", torch.tensor([1.0 + 2 * allowed, 0.0], dtype=dtype), truth, largest=2.0)
    with pytest.raises(KernelsDiffer, match="1 of 2 numbers differ, by up to inf"):
        require_close("x", torch.tensor([torch.nan, 0.0], dtype=dtype), truth, largest=1.0)
    with pytest.raises(KernelsDiffer, match=r"the shape is \(1, 2\), not \(2,\)"):
        require_close("x", torch.zeros(1, 2, dtype=dtype), truth, largest=1.0)


def test_same_bits() -> None:
    one = torch.tensor([torch.nan, 0.0])
    require_same_bits("x", one, one.clone())
    with pytest.raises(KernelsDiffer, match="x: 1 of 2 numbers are not those"):
        require_same_bits("x", one, torch.tensor([torch.nan, -0.0]))


def test_an_error_in_one_line() -> None:
    assert described(KernelsDiffer("a\n b")) == "a b"
    assert described(ValueError("a" * 1000)) == f"ValueError: {'a' * 397}..."
