"""A cache folder of the test's own, and a tiny packaged model known by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcomm.model import registry
from kvcomm.model.registry import PackagedModel
from tests.model.tiny_wheel import make_wheel
from tests.tiny import tiny_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, not yet made; returned is where models will be."""
    monkeypatch.setenv("KVCOMM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that $KVCOMM_WHEELS names."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("KVCOMM_WHEELS", str(folder))
    return folder


@pytest.fixture
def entry(cache: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """The packaged model "tiny", whose wheel lies in the wheels folder."""
    made = make_wheel(wheels, tiny_model())
    monkeypatch.setitem(registry.PACKAGED, made.name, made)
    return made
