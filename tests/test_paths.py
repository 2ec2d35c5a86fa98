"""Wherever a public function takes the path of a file, a text does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pytest

import kvcomm
import kvcomm.agents
import kvcomm.agents.tuning
from kvcomm import Engine, EngineConfig
from kvcomm.align.archive import export_archive, import_archive
from kvcomm.server.keys import KeyRing, add_key, remove_key
from kvcomm.server.settings import load_settings
from tests.tiny import TinyModel

EXPORTING = (kvcomm, kvcomm.agents, kvcomm.agents.tuning)
MORE = (
    "kvcomm.agents.tuning.rows:read_rows",
    "kvcomm.agents.example_runs:examples",
    "kvcomm.align.archive:export_archive",
    "kvcomm.align.archive:import_archive",
    "kvcomm.lab.timings:measure_restore",
    "kvcomm.memory.snapshots:read_header",
    "kvcomm.server.keys:KeyRing",
    "kvcomm.server.keys:add_key",
    "kvcomm.server.keys:remove_key",
    "kvcomm.lab.load.trace_file:read_trace",
    "kvcomm.server.settings:load_settings",
)
"""Functions that no package exports and programs use all the same."""


def public() -> Iterator[Any]:
    """Everything that users call by its name."""
    for module in EXPORTING:
        yield from (getattr(module, name) for name in module.__all__)
    for place in MORE:
        module_name, name = place.split(":")
        module: ModuleType = import_module(module_name)
        yield getattr(module, name)


def functions() -> Iterator[Callable[..., Any]]:
    """All of it that can be called, methods too."""
    for value in public():
        if inspect.isclass(value):
            methods = inspect.getmembers(value, lambda each: inspect.isfunction(each) or inspect.ismethod(each))
            yield from (each for name, each in methods if name == "__init__" or not name.startswith("_"))
        elif inspect.isfunction(value):
            yield value


def hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of its arguments; nothing where a name is there for type checkers only."""
    try:
        return {name: hint for name, hint in get_type_hints(function).items() if name != "return"}
    except NameError:
        return {name: hint for name, hint in function.__annotations__.items() if name != "return"}


def test_no_public_function_insists_on_a_path() -> None:
    found, wrong = 0, []
    for function in functions():
        for name, hint in hints(function).items():
            kinds = hint.split(" | ") if isinstance(hint, str) else [hint, *get_args(hint)]
            if Path in kinds or "Path" in kinds:
                found += 1
                if str not in kinds and "str" not in kinds:
                    wrong.append(f"{function.__qualname__}({name})")
    assert wrong == []
    assert found >= 15


def test_anchors_snapshots_and_archives_by_name(tiny: TinyModel, tmp_path: Path) -> None:
    config = EngineConfig(page_size=4, pool_tokens=512)
    with Engine(tiny.model, tiny.tokenizer, config=config) as engine:
        folder = str(tmp_path / "anchors")
        saved = engine.reuse.save(folder)
        assert engine.reuse.load(folder) == saved
        assert export_archive(folder, f"{tmp_path}/anchors.tar") == 0
        assert import_archive(f"{tmp_path}/anchors.tar", f"{tmp_path}/again") == 0
        with engine.context([5, 6, 7]) as context:
            assert context.save(f"{tmp_path}/one.safetensors") == tmp_path / "one.safetensors"
            assert context.save(str(tmp_path / "two.safetensors")) == tmp_path / "two.safetensors"
            with engine.restore(f"{tmp_path}/two.safetensors") as restored:
                assert restored.tokens == (5, 6, 7)


def test_keys_and_settings_by_name(tmp_path: Path) -> None:
    file = f"{tmp_path}/folder/keys.json"
    key = add_key(file, "ann")
    ring = KeyRing(file)
    found = ring.find(key)
    assert found is not None
    assert found.name == "ann"
    assert remove_key(file, "ann").name == "ann"
    settings = tmp_path / "server.toml"
    settings.write_text("port = 7\n")
    assert load_settings({}, {}, str(settings)).port == 7


def test_the_guard_finds_who_insists(monkeypatch: pytest.MonkeyPatch) -> None:
    def insisting(file: Path) -> None:
        """Takes no text."""

    monkeypatch.setattr("tests.test_paths.functions", lambda: iter([insisting]))
    with pytest.raises(AssertionError, match="insisting"):
        test_no_public_function_insists_on_a_path()
