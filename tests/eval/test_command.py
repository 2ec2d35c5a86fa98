"""What evaluations share as commands: how a run ends, in every way that it can, and the options."""

from __future__ import annotations

import json
import signal
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from eval.command import add_model, add_outputs, finish, positive
from eval.figures import Figure, Report
from kvcomm.errors import InvalidRequest


def parser() -> ArgumentParser:
    made = ArgumentParser()
    add_model(made)
    add_outputs(made, "speed")
    made.add_argument("--repeats", type=positive, default=3)
    return made


def outputs(folder: Path) -> Namespace:
    return parser().parse_args(["--json", "--out", str(folder / "run.json")])


def test_a_run_is_printed_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = outputs(tmp_path)
    assert finish(lambda: Report("speed", [Figure("one", 1.0, "s")], {"seed": 7}), options) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [figure["id"] for figure in printed["figures"]] == ["one"]
    saved = json.loads(options.out.read_text())
    assert saved["config"]["seed"] == printed["config"]["seed"] == 7


@pytest.mark.parametrize("error", [InvalidRequest("no such file"), OSError("no such file")])
def test_what_goes_wrong_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    def fails() -> Report:
        raise error

    options = outputs(tmp_path)
    assert finish(fails, options) == 1
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "error: no such file\n")
    assert not options.out.exists()


def test_a_run_that_is_told_to_end_does_so_in_order(tmp_path: Path) -> None:
    ended = []

    def works() -> Report:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            ended.append("yes")
        raise AssertionError("it goes on")

    with pytest.raises(SystemExit):
        finish(works, outputs(tmp_path))
    assert ended == ["yes"]


def test_options_have_defaults_and_say_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    options = parser().parse_args([])
    assert (options.model, options.json, options.out) == ("smollm2-135m", False, Path("out/speed.json"))
    for given, told in (("0", "argument --repeats: 0 is not positive"), ("few", "invalid positive value: 'few'")):
        with pytest.raises(SystemExit):
            parser().parse_args(["--repeats", given])
        assert told in capsys.readouterr().err
