"""The notebook runs from its first cell to its last, and shows what its text says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "first_steps.ipynb"


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    """HTML, or else text, that each cell of code shows, by how the cell begins."""
    notebook = nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    return {cell.source.splitlines()[0]: _shown(cell) for cell in notebook.cells if cell.cell_type == "code"}


def _shown(cell: Any) -> str:
    found = [output.data for output in cell.outputs if output.output_type == "execute_result"]
    return "".join(data.get("text/html") or data["text/plain"] for data in found)


def _of(shown: dict[str, str], beginning: str) -> str:
    (text,) = (text for first, text in shown.items() if first.startswith(beginning))
    return text


def _numbers(html: str, source: str) -> list[int]:
    return [int(number) for number in re.findall(rf'title="{source}: (\d+)"', html)]


def test_the_second_question_finds_the_instructions(shown: dict[str, str]) -> None:
    first, second = _of(shown, "instructions ="), _of(shown, "second =")
    assert not _numbers(first, "exact")
    (exact,), (computed,) = _numbers(second, "exact"), _numbers(second, "computed")
    assert exact > computed
    assert exact + computed == sum(_numbers(first, "computed"))  # the same tokens, but for one word


def test_forks_are_shown_as_one_tree(shown: dict[str, str]) -> None:
    html = _of(shown, "story =")
    assert html.count("lighthouse") == 1
    assert html.count("<li>") == 3


def test_the_team_moves_text(shown: dict[str, str]) -> None:
    first, second = _of(shown, "policy ="), _of(shown, "trains =")
    assert first.count("<tr>") == second.count("<tr>") == 4
    assert _numbers(first, "moved")
    assert sum(_numbers(second, "exact")) > sum(_numbers(first, "exact"))


def test_nothing_that_a_run_left_is_kept_in_the_file() -> None:
    for cell in nbformat.read(NOTEBOOK, nbformat.NO_CONVERT).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
