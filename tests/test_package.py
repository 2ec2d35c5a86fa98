"""The package as a whole: what it exports, what importing costs, and which way imports go."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kvcomm

APACHE_2_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
ROOT = Path(kvcomm.__file__).parent
LAYERS = [
    "__main__",
    "cli",
    "integrations",
    "server",
    "agents",
    "lab",
    "toolcalls",
    "engine",
    "reuse",
    "align",
    "tiers",
    "memory",
    "model",
    "config",
    "values",
    "files",
    "errors",
    "figures",
    "starting",
    "plain",
]
"""From top to bottom; a module imports from its own layer and from lower ones."""


def test_every_exported_name_is_there() -> None:
    for name in kvcomm.__all__:
        assert getattr(kvcomm, name) is not None
    assert dir(kvcomm) == sorted(kvcomm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        kvcomm.Nothing  # noqa: B018  # the access itself is tested


def test_the_licence_and_what_the_metadata_say() -> None:
    """The text is the one that the Apache foundation publishes; nothing in the metadata leads anywhere."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert project["authors"] == [{"name": "the kvcomm authors"}]
    assert hashlib.sha256((ROOT.parent / "LICENSE").read_bytes()).hexdigest() == APACHE_2_SHA256
    assert "urls" not in project
    assert project["classifiers"] == sorted(project["classifiers"])
    assert not any(each.startswith("License ::") for each in project["classifiers"])  # the expression says it


def test_importing_is_cheap() -> None:
    code = "import sys, kvcomm; print([m for m in ('torch', 'transformers', 'triton', 'faiss') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _imports(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return names | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


def test_imports_go_downwards() -> None:
    wrong = []
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts == ("__init__",):
            continue
        own = LAYERS.index(parts[0])
        for name in _imports(file):
            layer = name.split(".")[1] if name.startswith("kvcomm.") else None
            if layer is not None and LAYERS.index(layer) < own:
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("forbidden", ["pickle", "marshal", "shelve", "dill"])
def test_nothing_unpickles(forbidden: str) -> None:
    assert [str(file) for file in ROOT.rglob("*.py") if forbidden in _imports(file)] == []


BY_HAND = {"flashinfer", "vllm"}
"""Used where somebody installed it; there is no wheel of it that an extra could name for every machine."""


def test_what_is_imported_is_declared() -> None:
    """What only comes along with something else is gone with that one's next version."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    declared = {canonicalize_name(Requirement(each).name) for each in wanted}
    modules = {name.split(".")[0] for file in ROOT.rglob("*.py") for name in _imports(file)}
    known = packages_distributions()
    foreign = modules - sys.stdlib_module_names - {"kvcomm"} - BY_HAND
    undeclared = {
        name for name in foreign if not declared & {canonicalize_name(each) for each in known.get(name, [name])}
    }
    assert undeclared == set()


def test_floors_of_the_server() -> None:
    """Older starlettes read whole forms into memory and trust Host headers that are none."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    server = {each.name: each.specifier for each in map(Requirement, project["optional-dependencies"]["server"])}
    assert "1.0.1" in server["starlette"]
    assert "1.0.0" not in server["starlette"]
    assert "h11" in server
