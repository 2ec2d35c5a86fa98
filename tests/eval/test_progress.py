"""What a run says about how far it has come, and working on several things at once."""

from __future__ import annotations

import threading

import pytest

from eval.tasks.at_once import at_once
from eval.tasks.progress import Phases
from kvcomm import Engine
from tests.limits import PATIENCE_S
from tests.stalling import stalling
from tests.tiny import TinyModel


class Clock:
    """Goes on by as much as it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_tell_how_much_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Phases(clock) as phases, phases.phase("dense", 10) as advance:
        for _ in range(4):
            clock.now += 20.0
            advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "dense: 2 of 10, about 2 min 40 s left",
        "dense: 4 of 10, about 2 min 0 s left",
        "dense: 4 of 10 after 1 min 20 s",
    ]


def test_what_an_earlier_run_has_done_says_nothing_of_speed(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Phases(clock) as phases, phases.phase("dense", 10) as advance:
        advance(6)
        clock.now += 40.0
        advance(1)
    assert capsys.readouterr().err.splitlines()[0] == "dense: 7 of 10, about 2 min 0 s left"


def test_on_a_terminal_there_are_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with Phases() as phases, phases.phase("dense", 4) as advance:
        advance(4)
    err = capsys.readouterr().err
    assert "4/4" in err
    assert "left" in err


def test_several_things_are_worked_on_at_once(tiny: TinyModel) -> None:
    together = threading.Barrier(3, timeout=PATIENCE_S)

    def work(item: int) -> int:
        together.wait()
        return item * item

    with Engine(tiny.model, tiny.tokenizer) as engine:
        assert sorted(at_once(engine, work, range(6), 3)) == [0, 1, 4, 9, 16, 25]


def test_the_first_error_ends_everything(tiny: TinyModel) -> None:
    """What waits for the engine is not waited for, and what has not begun never does."""
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 0:
            raise KeyError("broken")
        engine.generate([5, 6, 7], max_new_tokens=400, ignore_eos=True)
        return item

    with Engine(tiny.model, tiny.tokenizer) as engine, stalling(engine), pytest.raises(KeyError, match="broken"):
        list(at_once(engine, work, range(100), 2))
    assert 0 in begun
    assert len(begun) <= 3  # two at once, and one in the place of the one that failed
