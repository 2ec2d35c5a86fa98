"""`kvcomm doctor --families`: its table, the page it writes, and that the page in docs/ says what the command says."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import transformers

from kvcomm.cli.app import run
from kvcomm.cli.doctor_families import BEGIN, END, markdown, tried_families, write_page
from kvcomm.lab.families import FamilyOutcome, try_family
from kvcomm.model.families import families

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def rows_of(page: str) -> dict[str, str]:
    """The lines of a page's table by family."""
    lines = page.partition(BEGIN)[2].partition(END)[0].splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ") and "---" not in line}


def line_of(row: dict[str, Any]) -> str:
    return markdown([row]).splitlines()[-1]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only two families."""
    monkeypatch.setattr("kvcomm.model.families.families", lambda: {"falcon": "", "llama": "LlamaForCausalLM"})


@pytest.mark.usefixtures("few")
def test_table_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Head\n\n{BEGIN}\nold\n{END}\n\nfoot\n")
    assert run(["doctor", "--families", "--page", str(page), "--json"]) == 0
    falcon, llama = json.loads(capsys.readouterr().out)["families"]
    assert (falcon["family"], falcon["outcome"]) == ("falcon", "refused")
    assert llama == {
        "family": "llama",
        "model": "LlamaForCausalLM",
        "outcome": "works",
        "attention": "full",
        "reason": "",
    }
    text = page.read_text()
    assert text.startswith(f"# Head\n\n{BEGIN}\n\n1 refused, 1 works.\n")
    assert text.endswith(f"| llama | LlamaForCausalLM | works | full |  |\n\n{END}\n\nfoot\n")
    write_page(page, [falcon, llama])
    assert page.read_text() == text


@pytest.mark.usefixtures("few")
def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--families"]) == 0
    out = capsys.readouterr().out
    assert "Families: 1 refused, 1 works" in out
    assert "its layers attend by code of their own" in out


def test_a_page_without_a_place_for_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{END}\n{BEGIN}\n")
    for file in (page, tmp_path / "missing.md"):
        with pytest.raises(ValueError, match=file.name):
            write_page(file, [])


def test_page_is_where_families_go(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--page", "page.md"]) == 2
    assert "kvcomm doctor --families --page FILE" in capsys.readouterr().err


def test_the_page_in_docs_names_every_family() -> None:
    assert list(rows_of(PAGE.read_text()))[1:] == list(families()), f"transformers {transformers.__version__}"


def test_nothing_in_the_page_is_wrong() -> None:
    assert not [line for line in rows_of(PAGE.read_text()).values() if f"| {FamilyOutcome.WRONG} |" in line]


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "qwen3", "opt", "deepseek_v3"])
def test_the_page_in_docs_says_what_is_found(name: str) -> None:
    assert rows_of(PAGE.read_text())[name] == line_of(asdict(try_family(name)))


@pytest.mark.slow
def test_the_page_in_docs_is_what_the_command_writes() -> None:
    assert list(rows_of(PAGE.read_text()).values())[1:] == [line_of(row) for row in tried_families()]
