"""Which way of keeping programs apart is taken, what evaluations say of it, and what the kernel is asked to refuse."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import pytest

from eval import gsm8k, humaneval
from eval.sandbox import NONE, WAYS, Isolation, NoIsolation, __main__, choosing, isolation, obstacle
from eval.sandbox.system_calls import filter_program
from eval.tasks.gsm8k import Gsm8k
from eval.tasks.humaneval import HumanEval
from eval.tasks.program import note_isolation

ALLOWED, REFUSED, MISSING = "allowed", errno.EPERM, errno.ENOSYS
AMD64, ARM64 = 0xC000_003E, 0xC000_00B7
THREAD_FLAGS, FORK_FLAGS, NEW_USER = 0x3D0F00, 17, 0x1000_0000


def outcome(program: bytes, machine: int, number: int, argument: int = 0) -> object:
    """What a filter makes of a system call: the classic packet filter's machine, as far as filters use it."""
    data = struct.pack("=IIQ6Q", number, machine, 0, argument, 0, 0, 0, 0, 0)
    steps = list(struct.iter_unpack("=HBBI", program))
    accumulator = at = 0
    while True:
        code, yes, no, operand = steps[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, operand)
        elif code == 0x06:
            kind, value = operand & 0xFFFF_0000, operand & 0xFFFF
            return {0x7FFF_0000: ALLOWED, 0x0005_0000: value}.get(kind, "killed")
        else:
            holds = {
                0x15: accumulator == operand,
                0x35: accumulator >= operand,
                0x45: bool(accumulator & operand),
            }[code]
            at += yes if holds else no


@pytest.mark.parametrize(
    ("machine", "audit", "calls"),
    [
        (
            "x86_64",
            AMD64,
            {0: ALLOWED, 9: ALLOWED, 59: ALLOWED, 57: REFUSED, 58: REFUSED, 41: REFUSED, 101: REFUSED, 272: REFUSED}
            | {165: REFUSED, 250: REFUSED, 29: REFUSED, 425: REFUSED, 435: MISSING, 0x4000_0039: MISSING, 53: ALLOWED},
        ),
        (
            "aarch64",
            ARM64,
            {63: ALLOWED, 222: ALLOWED, 221: ALLOWED, 198: REFUSED, 117: REFUSED, 97: REFUSED, 40: REFUSED}
            | {219: REFUSED, 194: REFUSED, 425: REFUSED, 435: MISSING, 199: ALLOWED},
        ),
    ],
)
def test_the_filter_refuses_what_it_should(machine: str, audit: int, calls: dict[int, object]) -> None:
    program = filter_program(machine)
    assert {number: outcome(program, audit, number) for number in calls} == calls
    assert outcome(program, AMD64 ^ ARM64 ^ audit, 0) == "killed"


@pytest.mark.parametrize(("machine", "audit", "clone"), [("x86_64", AMD64, 56), ("aarch64", ARM64, 220)])
def test_threads_are_made_and_processes_are_not(machine: str, audit: int, clone: int) -> None:
    program = filter_program(machine)
    assert outcome(program, audit, clone, THREAD_FLAGS) == ALLOWED
    assert outcome(program, audit, clone, FORK_FLAGS) == REFUSED
    assert outcome(program, audit, clone, NEW_USER | FORK_FLAGS) == REFUSED


def test_an_unknown_machine_has_no_filter() -> None:
    assert filter_program("vax") == b""


@pytest.fixture
def helpless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that offers nothing."""
    monkeypatch.setattr(choosing, "obstacle", lambda way: None if way == NONE else f"no {way.name} here")


def test_the_first_way_that_works_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for works in WAYS:
        monkeypatch.setattr(choosing, "obstacle", lambda way, works=works: None if way == works else "no")
        assert isolation() == works
        assert isolation(unsafe=True) == works


@pytest.mark.usefixtures("helpless")
def test_nothing_runs_where_nothing_works() -> None:
    with pytest.raises(NoIsolation, match=r"bubblewrap, as another user: no bubblewrap here; .*--unsafe") as refused:
        isolation()
    assert "no namespaces here" in str(refused.value)
    assert isolation(unsafe=True) == NONE


@pytest.mark.usefixtures("helpless")
def test_evaluations_refuse_before_they_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "def f(x):\n", "entry_point": "f", "test": "", "question": "1?", "answer": "#### 1"}
    for name, main in (("humaneval", humaneval.main), ("gsm8k", gsm8k.main)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({**row, "n": n}) + "\n" for n in range(80)))
        assert main([f"--data={file}", f"--train={file}", "--limit=1", f"--out={tmp_path / name}"]) == 1
        assert "cannot be kept apart from this system" in capsys.readouterr().err
        assert not (tmp_path / name).exists()


@pytest.mark.usefixtures("helpless")
def test_a_team_without_a_programmer_runs_no_programs() -> None:
    assert Gsm8k().isolation(["solver"]) is None
    with pytest.raises(NoIsolation):
        Gsm8k().isolation(["solver", "programmer"])
    with pytest.raises(NoIsolation):
        HumanEval().isolation([])
    assert HumanEval(unsafe=True).isolation([]) == NONE
    assert HumanEval(unsafe=True).score("    return 2", {}, ROW).is_right


ROW = {"prompt": "def two():\n", "entry_point": "two", "test": "def check(f):\n    assert f() == 2\n"}


def test_what_is_not_safe_is_said_loudly(capsys: pytest.CaptureFixture[str]) -> None:
    note_isolation(NONE)
    assert "WARNING: --unsafe" in capsys.readouterr().err
    note_isolation(WAYS[1])
    assert capsys.readouterr().err == "programs are kept apart by bubblewrap, in a user namespace\n"


def test_help_says_what_is_promised(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        humaneval.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--unsafe" in said
    assert "none of your files, no environment, no other process, no network" in said
    assert "Not promised: anything about faults of the kernel" in said


def test_every_way_is_listed_with_what_hinders_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(__main__, "obstacle", lambda way: None if way == WAYS[-1] else "not here")
    assert __main__.main([]) == 0
    first, *_, last, _ = capsys.readouterr().out.splitlines()
    assert first.endswith("does not work: not here")
    assert last.startswith(str(WAYS[-1]))
    assert last.endswith("used")
    monkeypatch.setattr(__main__, "obstacle", lambda way: "not here")
    assert __main__.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["isolation"] is None


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_an_obstacle_has_a_reason(way: Isolation) -> None:
    if not way.maps_user and os.getuid() != 0:
        assert obstacle(way) == "only for root"
    assert obstacle(way) != ""


def test_a_way_whose_program_is_missing_is_no_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert choosing.obstacle.__wrapped__(WAYS[1]) == "bwrap is not installed"
