"""`scripts/setup-env --integration NAME`: names, what is installed in which order, and that it is done once."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
FAKE = """#!/usr/bin/env bash
# Python and pip that only write down how they were called.
printf '%s\\n' "$*" >> "$CALLS"
case "$*" in
    *hashlib*) exec "$REAL" "$@" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *install*"${FAILS:-nothing fails}"*) exit 1 ;;
esac
"""


class Checkout:
    """A folder with the script and some integrations, and a Python that only notes what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_file = folder / "calls"
        (folder / "scripts/integrations").mkdir(parents=True)
        shutil.copy(SCRIPTS / "setup-env", folder / "scripts")
        for name in ("pyproject.toml", "constraints.txt"):
            (folder / name).write_text("")
        for name in ("one.txt", "two.txt", "two.no-deps.txt"):
            (folder / "scripts/integrations" / name).write_text(f"{name}\n")
        fake = folder / "python"
        fake.write_text(FAKE)
        fake.chmod(0o755)

    def run(self, *arguments: str, fails: str = "") -> subprocess.CompletedProcess[str]:
        """Call the script."""
        self.calls_file.write_text("")
        real = shutil.which("python3") or "python3"
        variables = {"PYTHON": str(self.folder / "python"), "CALLS": str(self.calls_file), "REAL": real}
        if fails:
            variables["FAILS"] = fails
        command = ["bash", "scripts/setup-env", *arguments]
        return subprocess.run(
            command, cwd=self.folder, env={**os.environ, **variables}, capture_output=True, text=True, check=False
        )

    @property
    def installs(self) -> list[str]:
        """What pip was asked to install, in order."""
        return [
            line.split("--disable-pip-version-check ")[1]
            for line in self.calls_file.read_text().splitlines()
            if "install" in line
        ]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """One in which nothing has been made yet."""
    return Checkout(tmp_path)


def test_an_environment_of_its_own_is_made_once(checkout: Checkout) -> None:
    first = checkout.run("--integration", "two")
    assert first.returncode == 0, first.stderr
    assert checkout.installs == [
        "--requirement scripts/integrations/two.txt",
        "--no-deps --requirement scripts/integrations/two.no-deps.txt",
        "--no-deps --editable .",
    ]
    assert (checkout.folder / ".integrations/two/bin/python").exists()
    assert not (checkout.folder / ".venv").exists()
    again = checkout.run("--integration", "two")
    assert (again.returncode, again.stdout) == (0, "setup-env: .integrations/two is up to date\n")
    assert checkout.installs == []


@pytest.mark.parametrize(
    "changed", ["scripts/integrations/two.no-deps.txt", "scripts/integrations/two.txt", "pyproject.toml"]
)
def test_what_it_is_made_from_has_changed(checkout: Checkout, changed: str) -> None:
    checkout.run("--integration", "two")
    checkout.run("--integration", "one")
    (checkout.folder / changed).write_text("changed\n")
    checkout.run("--integration", "two")
    assert len(checkout.installs) == 3
    checkout.run("--integration", "one")
    assert len(checkout.installs) == (2 if changed == "pyproject.toml" else 0)


def test_what_cannot_be_installed_is_told_and_tried_again(checkout: Checkout) -> None:
    failed = checkout.run("--integration", "one", fails="one.txt")
    assert failed.returncode == 1
    assert failed.stderr == (
        "setup-env: pip failed (see above); .integrations/one is incomplete, and the next call continues there\n"
    )
    assert checkout.run("--integration", "one").returncode == 0
    assert checkout.installs == ["--requirement scripts/integrations/one.txt", "--no-deps --editable ."]


@pytest.mark.parametrize("name", [[], ["nope"], ["two.no-deps"], ["one two"], [""]])
def test_other_names_are_refused(checkout: Checkout, name: list[str]) -> None:
    refused = checkout.run("--integration", *name)
    assert refused.returncode == 1
    assert "one two" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (checkout.folder / ".integrations").exists()


def test_every_integration_says_what_it_is_for() -> None:
    for file in (SCRIPTS / "integrations").glob("*.txt"):
        lines = file.read_text().splitlines()
        assert lines[0].startswith("#") or file.name.endswith(".no-deps.txt"), file.name
