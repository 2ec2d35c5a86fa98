"""The API reference: every public name is in it, and whatever is in it has a docstring that says what it does."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterator
from functools import cache

import griffe
import pytest

import kvcomm
from kvcomm import agents, lab
from tests.docs.snippets import ROOT

REFERENCES = (ROOT / "docs" / "api.md", ROOT / "docs" / "lab.md")
NAMES = [name for page in REFERENCES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
LAB = [lab.__name__, *(each.name for each in pkgutil.walk_packages(lab.__path__, f"{lab.__name__}."))]
SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")


@cache
def package() -> griffe.Module:
    found = griffe.load("kvcomm", search_paths=[ROOT], resolve_aliases=True)
    assert isinstance(found, griffe.Module)
    return found


def described(name: str) -> griffe.Object:
    """What a dotted name of the reference stands for."""
    found = package()[name.removeprefix("kvcomm.")]
    target = found.final_target if isinstance(found, griffe.Alias) else found
    assert isinstance(target, griffe.Object)
    return target


def parts(name: str) -> Iterator[griffe.Object]:
    """The thing itself, and what the reference shows of it: public functions, classes and their public methods."""
    found = described(name)
    yield found
    for member in found.members.values():
        if member.name == "__init__" and member.docstring is not None:
            assert isinstance(member, griffe.Function)
            yield member
        if member.name.startswith("_"):
            continue
        if isinstance(member, griffe.Class) and found.is_module:
            yield from parts(member.path)
        elif isinstance(member, griffe.Function) or (
            isinstance(member, griffe.Attribute) and "property" in member.labels
        ):
            yield member


@pytest.mark.parametrize("module", [kvcomm, agents], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module: object) -> None:
    own = {described(name).path for name in NAMES}
    errors = {each.path for each in described("kvcomm.errors").members.values()}
    for name in getattr(module, "__all__"):  # noqa: B009  # of two modules
        if not name.startswith("__"):
            path = described(f"{module.__name__}.{name}").path  # type: ignore[attr-defined]
            assert path in own | errors, f"{path} is public and not in docs/api.md"


@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_in_the_reference_says_what_it_does(name: str) -> None:
    silent = [
        f"{part.path} ({part.relative_filepath}:{part.lineno})"
        for part in parts(name)
        if part.docstring is None or part.docstring.value.strip().startswith(SECTIONS)
    ]
    assert not silent, f"no docstring, or none that begins with a sentence: {', '.join(silent)}"


def test_every_module_for_comparison_is_in_the_reference() -> None:
    assert set(LAB[1:]) - set(NAMES) == set()


@pytest.mark.parametrize("name", LAB[1:])
def test_whatever_a_module_for_comparison_hands_on_is_described(name: str) -> None:
    """By its own docstring, or by name in that of the module."""
    module = described(name)
    assert module.docstring is not None
    told = module.docstring.value
    silent = [
        export
        for export in module.exports or ()
        if f"`{export}`" not in told and described(f"{name}.{export}").docstring is None
    ]
    assert not silent, f"{name} hands on what nobody describes: {', '.join(map(str, silent))}"
