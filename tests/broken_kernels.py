"""Kernels with one mistake each, made of the real source, so that tests can see them caught."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

COMPILES_NOT = 'tl.static_assert(False, "no such instruction")'


class Mistake(NamedTuple):
    """A part of a kernel's source, and what stands there instead."""

    right: str
    wrong: str


def broken(source: Path, mistake: Mistake, folder: Path) -> ModuleType:
    """The module of a file with that mistake in it, loaded from a copy in `folder`."""
    copy = folder / source.name
    copy.write_text(broken_text(source, mistake))
    spec = spec_from_file_location(f"broken_{source.stem}", copy)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def broken_text(source: Path, mistake: Mistake) -> str:
    """The file's text with that mistake in it, which must be one."""
    text = source.read_text()
    assert mistake.right in text
    return text.replace(mistake.right, mistake.wrong)
