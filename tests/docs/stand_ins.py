"""Commands of the pages that tests do not run as they stand: which, why, and what is looked at instead.

Whatever is not in the table is run. What is looked at is at least that all that a command names is there: the module,
the script, the extra, and every option that it gives.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from itertools import takewhile
from typing import NamedTuple

import pytest

from tests.docs.snippets import ROOT
from tests.limits import PATIENCE_S

Words = Sequence[str]


class StandIn(NamedTuple):
    """Commands that begin with these words, why they are not run, and what is looked at instead."""

    begins: str
    why: str
    check: Callable[[Words], None]


def options_of_evaluation(words: Words) -> None:
    """The evaluation is there, and takes the options and the values that it is given."""
    is_folder = (ROOT / words[2].replace(".", "/")).is_dir()
    module = importlib.import_module(f"{words[2]}.__main__" if is_folder else words[2])
    arguments = list(takewhile(lambda word: word not in (">", "|", "&&", ";"), words[3:]))
    said = StringIO()
    with redirect_stdout(said), pytest.raises(SystemExit) as end:
        module.main([*arguments, "--help"])
    assert not end.value.code, (words, end.value.code)
    _require_options(words, said.getvalue())


def options_of_command(words: Words) -> None:
    """The subcommand of kvcomm is there and has these options."""
    names: list[str] = []
    for word in words[1:]:
        if not re.fullmatch(r"[a-z-]+", word) or word.startswith("-"):
            break
        names.append(word)
    for end in range(len(names), 0, -1):  # words behind the subcommand may be its arguments
        ran = subprocess.run(
            [sys.executable, "-m", "kvcomm", *names[:end], "--help"],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
            env={"COLUMNS": "200", "NO_COLOR": "1", "PYTHONPATH": str(ROOT), "TERM": "dumb"},
        )
        if ran.returncode == 0:
            return _require_options(words, ran.stdout)
    raise AssertionError(f"kvcomm has no such command: {' '.join(words)}")


def script_is_there(words: Words) -> None:
    """The script is there and is a valid one."""
    subprocess.run([words[0], "-n", ROOT / words[1]] if words[0] == "bash" else ["ls", ROOT / words[1]], check=True)


def tests_are_there(words: Words) -> None:
    """The files of tests are there."""
    files = [word for word in words if word.endswith(".py")]
    assert files, words
    assert all((ROOT / file).is_file() for file in files), words


def integration_is_there(words: Words) -> None:
    """`scripts/setup-env --integration NAME` knows the name."""
    assert (ROOT / "scripts" / "integrations" / f"{words[3]}.txt").is_file(), words


def extras_are_there(words: Words) -> None:
    """What pip is to install of kvcomm is declared."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if extras := re.fullmatch(r"(?:\.|kvcomm|kvcomm-\S*\.whl)\[(.*)\]", word):
            assert set(extras[1].split(",")) <= declared.keys(), words
        if word.endswith(".txt"):
            assert (ROOT / word).is_file(), words


def names_are_there(words: Words) -> None:
    """Every dotted name of kvcomm's that another program is given is there."""
    for name in re.findall(r"kvcomm(?:\.\w+)+", " ".join(words)):
        path = ROOT / name.replace(".", "/")
        holder = path if path.is_dir() else path.with_suffix(".py")
        if not holder.exists():  # the last part is a class of the module
            holder, (_, _, last) = path.parent.with_suffix(".py"), name.rpartition(".")
            assert f"class {last}" in holder.read_text(), name


def _require_options(words: Words, known: str) -> None:
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"{re.escape(word.partition('=')[0])}\b", known), (word, " ".join(words))


MINUTES = "takes minutes, and data that the reader brings"
SERVES = "serves until it is stopped; tests/cli/test_serve.py starts and stops it"
STAND_INS = (
    StandIn("python -m eval.", MINUTES, options_of_evaluation),
    StandIn("python scripts/compile_kernels.py", "takes minutes; tests/scripts runs it", script_is_there),
    StandIn("bash scripts/setup-env --integration", "installs gigabytes", integration_is_there),
    StandIn("bash scripts/", "makes a virtual environment; CI runs it", script_is_there),
    StandIn("python examples/", "tests/examples runs every example against a server", script_is_there),
    StandIn("pip install", "changes the environment that runs the tests; CI installs the wheel", extras_are_there),
    StandIn("python -m pytest", "tests do not run tests", tests_are_there),
    StandIn("kvcomm serve ", SERVES, options_of_command),
    StandIn("kvcomm top", "shows a running server until it is stopped; tests/cli/test_top.py", options_of_command),
    StandIn("kvcomm bench", MINUTES, options_of_command),
    StandIn("kvcomm run", "a team's answers take a minute; tests/cli/test_run.py", options_of_command),
    StandIn("vllm serve", "needs vLLM; tests/integrations/vllm", names_are_there),
    StandIn("serve run", "needs Ray; tests/integrations/ray", names_are_there),
)

RUN = ("kvcomm serve keys ", "kvcomm serve --check ")
"""Commands that are run although what they begin with is in the table."""


def stand_in(words: Words) -> StandIn | None:
    """The row of the table that a command is under; None: it is run."""
    text = " ".join(words) + " "
    if text.startswith(RUN):
        return None
    return next((each for each in STAND_INS if text.startswith(each.begins)), None)
