"""`--adapter NAME=FOLDER` of `kvcomm run`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kvcomm.cli.app import run
from kvcomm.engine.engine import Engine
from tests.lora import save_lora

pytestmark = pytest.mark.usefixtures("home", "engines")


def test_one_prompt_is_answered_by_its_adapter(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Path
) -> None:
    folder = save_lora(tmp_path / "lora", seed=1)
    arguments = ["run", "--prompt", "The dog", "--raw", "--max-new-tokens", "5", "--temperature", "0", "--json"]
    texts = []
    for more in ([], ["--adapter", f"poet={folder}"]):
        assert run([*arguments, *more]) == 0
        texts.append(json.loads(capsys.readouterr().out)["rounds"][0]["answer"]["text"])
    with Engine.load(model_folder) as engine:
        engine.adapters.load("poet", folder)
        expected = [engine.generate("The dog", adapter=each, max_new_tokens=5).text for each in (None, "poet")]
    assert texts == expected
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["poet"], "not of the form NAME=FOLDER"),
        (["=x"], "not of the form NAME=FOLDER"),
        (["a=x", "a=y"], "is given twice"),
        (["a=x", "b=y"], "one prompt is answered by one adapter"),
        (["poet=nowhere"], "nowhere is no folder"),
        (["po:et=nowhere"], "bad adapter name"),
    ],
)
def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], given: list[str], message: str) -> None:
    flags = [flag for each in given for flag in ("--adapter", each)]
    assert run(["run", "--prompt", "x", *flags]) != 0
    found = " ".join(capsys.readouterr().err.split())
    assert re.search(message, found), found
