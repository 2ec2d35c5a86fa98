"""Every snippet of README.md and of the pages in docs/ is run, or stands in one table with the reason why it is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from kvcomm import Engine
from kvcomm.model.loading import LoadedModel
from tests.docs import brought
from tests.docs.snippets import LANGUAGES, PAGES, ROOT, Command, Snippet, commands_in, commands_of, python_of, snippets
from tests.docs.stand_ins import STAND_INS, stand_in
from tests.limits import PATIENCE_S
from tests.server.live import Live

IDS = [str(page.relative_to(ROOT)) for page in PAGES]
WITH_ADAPTERS = "adapters.load("
"""Pages with this in their Python need adapters on disk."""
FAULTS: dict[str, str] = {}
"""Pages whose Python does not run as pasted, and why; one that is mended has no place here."""


@pytest.fixture(scope="module")
def live(smollm2: LoadedModel) -> Iterator[Live]:
    with brought.server(smollm2) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the reader works: an empty folder with what pages take for granted."""
    brought.write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVCOMM_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_block_says_its_language(page: Path) -> None:
    unknown = [f"{each.place}: {each.language!r}" for each in snippets(page) if each.language not in LANGUAGES]
    assert not unknown, f"fence these blocks with one of {sorted(LANGUAGES)}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_data_can_be_read(page: Path) -> None:
    readers = {"json": json.loads, "toml": tomllib.loads}
    for each in snippets(page):
        if each.language in readers:
            readers[each.language](each.text)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_that_are_not_run_are_right_all_the_same(page: Path) -> None:
    for command in commands_of(page):
        if (row := stand_in(command.words)) is not None:
            row.check(command.words)


def test_every_row_of_the_table_is_needed() -> None:
    used = {stand_in(command.words) for page in PAGES for command in commands_of(page)}
    assert [row.begins for row in STAND_INS if row not in used] == []


def _running() -> Iterator[ParameterSet]:
    for page in PAGES:
        if python_of(page) or any(stand_in(each.words) is None for each in commands_of(page)):
            why = FAULTS.get(page.name)
            marks = () if why is None else pytest.mark.xfail(reason=why, strict=True)
            yield pytest.param(page, id=page.name, marks=marks)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("page", list(_running()))
def test_a_page_runs_as_pasted(page: Path, folder: Path, live: Live) -> None:
    """Python and commands in the order of the page: in one namespace, one folder, and against one server."""
    if any(WITH_ADAPTERS in each.text for each in python_of(page)):
        brought.write_adapters(folder)
    namespace: dict[str, Any] = {"__name__": "__main__", **brought.names(live)}
    problems: list[str | None] = []
    try:
        for each in snippets(page):
            if each.language == "python":
                problems.append(_executed(each, namespace))
            if each.language == "bash":
                problems += [_called(command, live) for command in commands_in(each) if stand_in(command.words) is None]
    finally:
        for value in namespace.values():
            if isinstance(value, Engine):
                value.close()
    failed = [problem for problem in problems if problem is not None]
    assert not failed, "\n\n".join(failed)


def _executed(snippet: Snippet, namespace: dict[str, Any]) -> str | None:
    """What went wrong with a block; further blocks are run all the same, so that a page is mended at once."""
    lines_before = "\n" * (snippet.line - 1)  # so that tracebacks name the line of the page
    try:
        exec(compile(lines_before + snippet.text, str(snippet.page), "exec"), namespace)
    except Exception:
        return f"{snippet.place}\n{traceback.format_exc(limit=-2)}"
    return None


def _called(command: Command, live: Live) -> str | None:
    """What went wrong with a command, run in the folder of the test; addresses are those of the test's server."""
    text = command.text.replace(brought.ADDRESS, live.url).replace("/srv/", f"{Path.cwd()}/")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", "-c", text.replace("curl ", "curl --fail-with-body ", 1)],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    if ran.returncode:
        return f"{command.place}: {text}\nexit code {ran.returncode}\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}"
    return None
