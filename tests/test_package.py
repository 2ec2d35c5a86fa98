"""The package as a whole: what it exports, what importing costs, and which way imports go."""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
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
    "lab",
    "agents",
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
    "pictures",
    "plain",
]
"""From top to bottom; a module imports from its own layer and from lower ones."""
CLASS_NAME = r"[A-Z]\w*[a-z]\w*"


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


def test_a_class_has_its_name_for_itself() -> None:
    """One name, one idea: no other public class, and no alias of a type, in kvcomm is called as a public class is."""
    trees = {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in ROOT.rglob("*.py")}
    assert [*_shared_names(trees)] == []


def test_a_shared_name_is_found() -> None:
    """Of the check above. Private classes, aliases alone, and constants may be called alike."""
    sources = {
        "a.py": "class Node: ...\nclass _Row: ...\nclass Plan:\n    class Step: ...\nIds = list[int]\nclass PAGE: ...",
        "b.py": "if True:\n    class Node: ...\nclass _Row: ...\nPlan: TypeAlias = int\nIds = tuple[int]\nPAGE = 1",
        "c.py": "def make():\n    class Step: ...\n    Plan = 1",
    }
    assert [*_shared_names({file: ast.parse(source) for file, source in sources.items()})] == [
        "Node: a.py, b.py",
        "Plan: a.py, b.py",
        "Step: a.py, c.py",
    ]


def _shared_names(trees: Mapping[str, ast.Module]) -> Iterator[str]:
    """Names of public classes that stand for something else as well, and the files where they do."""
    classes: dict[str, list[str]] = {}
    aliases: dict[str, list[str]] = {}
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes.setdefault(node.name, []).append(file)
        for name in _aliases(tree):
            aliases.setdefault(name, []).append(file)
    for name, files in sorted(classes.items()):
        if len(places := [*files, *aliases.get(name, ())]) > 1:
            yield f"{name}: {', '.join(places)}"


def _aliases(module: ast.Module) -> Iterator[str]:
    """What a module assigns to names that are written as those of classes are."""
    for node in module.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        yield from (each.id for each in targets if isinstance(each, ast.Name) and re.fullmatch(CLASS_NAME, each.id))


def test_the_laboratory_serves_nobody() -> None:
    """Only the command line measures with it; no request may come through what serves comparison."""
    below = [file for file in ROOT.rglob("*.py") if file.relative_to(ROOT).parts[0] not in ("lab", "cli")]
    assert [str(file) for file in below if any(_is_in(name, "kvcomm.lab") for name in _imports(file))] == []


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_no_two_evaluations_import_each_other() -> None:
    folder = ROOT.parent / "eval"
    names = {".".join(file.relative_to(ROOT.parent).with_suffix("").parts): file for file in folder.rglob("*.py")}
    known = {name.removesuffix(".__init__"): _imported_modules(file) for name, file in names.items()}
    assert [(a, b) for a, wanted in known.items() for b in wanted if a < b and a in known.get(b, ())] == []


def _imported_modules(file: Path) -> set[str]:
    """What a module imports, and what might be modules among the names that it takes from packages."""
    froms = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom) and node.module]
    return _imports(file) | {f"{node.module}.{alias.name}" for node in froms for alias in node.names}


LISTED = (
    "kvcomm",
    "kvcomm.agents",
    "kvcomm.server",
    "kvcomm.server.kv_events",
    "kvcomm.tiers",
    "kvcomm.integrations.ray",
    "kvcomm.integrations.vllm",
)
"""Packages whose public names are those of their `__all__`."""
WHOLE = ("kvcomm.errors", "kvcomm.config", "kvcomm.lab")
"""All of whose modules are public: what they define, and what their `__all__` lists where they have one."""


def test_evaluations_import_public_names_only() -> None:
    files = [file for folder in ("eval", "examples") for file in (ROOT.parent / folder).rglob("*.py")]
    assert files
    assert [f"{file}: {name}" for file in files for name in _not_public(ast.parse(file.read_text()))] == []


def test_what_is_not_public_is_found() -> None:
    """Of the check above: one public name and one that is none from each kind of module."""
    source = """
from kvcomm import Engine, Sequence
from kvcomm.agents import Agent, AgentGraph
from kvcomm.lab.moving import Rung, DEFAULT_TENANT
from kvcomm.lab.timings import Samples, Engine, _forks
from kvcomm.errors import KVCommError
from kvcomm.memory.pool import PagePool
import kvcomm.memory
def f():
    from kvcomm.server.app import make_app
"""
    assert [*_not_public(ast.parse(source))] == [
        "kvcomm.Sequence",
        "kvcomm.agents.AgentGraph",
        "kvcomm.lab.moving.DEFAULT_TENANT",
        "kvcomm.lab.timings.Engine",
        "kvcomm.lab.timings._forks",
        "kvcomm.memory.pool.PagePool",
        "kvcomm.memory",
        "kvcomm.server.app.make_app",
    ]


def _not_public(tree: ast.AST) -> Iterator[str]:
    """Names of kvcomm that a module imports and that are not public, in order."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if _is_in(alias.name, "kvcomm")]
            yield from (name for name in names if name not in LISTED and not any(_is_in(name, each) for each in WHOLE))
        elif isinstance(node, ast.ImportFrom) and node.module and _is_in(node.module, "kvcomm"):
            for alias in node.names:
                if not _is_public(node.module, alias.name):
                    yield f"{node.module}.{alias.name}"


def _is_public(module: str, name: str) -> bool:
    if any(_is_in(module, each) for each in WHOLE):
        return _file_of(f"{module}.{name}") is not None or name in (_listed(module) or _defined(module))
    return module in LISTED and name in (_listed(module) or ())


def _file_of(module: str) -> Path | None:
    path = ROOT.parent.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


@cache
def _listed(module: str) -> list[str] | None:
    """What stands in the `__all__` of a module; None: it has none."""
    file = _file_of(module)
    assert file is not None, module
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return None


@cache
def _defined(module: str) -> set[str]:
    """What a module makes itself and gives no private name."""
    file = _file_of(module)
    assert file is not None, module
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {ast.unparse(target) for target in targets}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("package", LISTED)
def test_what_a_package_lists_is_there(package: str) -> None:
    """Of what is loaded with its first use as well: a package may list what only an extra brings."""
    if package == "kvcomm.integrations.vllm":
        pytest.importorskip("vllm")
    module = import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018  # the access itself is tested


INTERNALS = {
    "backend",
    "geometry",
    "live",
    "lock",
    "memory",
    "parts",
    "pool",
    "runner",
    "scheduler",
    "tree",
}
"""Of an engine, and of its `reuse`; those below may use them, and `kvcomm.lab`, where it measures them."""
ENGINES = re.compile(r"(^|_|\b)(engine|twin|cold|reuse)$")
"""Ends what an engine, or its `reuse`, is called where it is used."""


def test_nobody_outside_reaches_into_an_engine() -> None:
    files = [file for folder in ("kvcomm/server", "eval", "examples") for file in (ROOT.parent / folder).rglob("*.py")]
    assert [f"{file}: {use}" for file in files for use in _reaches(ast.parse(file.read_text()))] == []


def test_reaching_into_an_engine_is_found() -> None:
    """Of the check above."""
    source = """
with self._engine.lock, other.lock:
    state.engine.pool.allocate(engine.reuse.parts.idle.worked_s)
engine.reuse.readers()
engine._tools.maker
peer.tree.pause()
"""
    assert sorted(_reaches(ast.parse(source))) == [
        "engine._tools",
        "engine.reuse.parts",
        "self._engine.lock",
        "state.engine.pool",
    ]


def _reaches(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not ENGINES.search(ast.unparse(node.value)):
            continue
        if node.attr in INTERNALS or re.match("_(?!_)", node.attr):
            yield ast.unparse(node)


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
