"""A model folder for evaluations, as a user would name one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.conftest import ROWS_ONLY
from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama and its tokenizer on disk; up to 512 tokens. Tests never change it."""
    folder = tmp_path_factory.mktemp("tiny")
    made = tiny_model()
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _fixed_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether moving pays for a tiny model depends on how busy the machine was when it was measured; not here."""
    monkeypatch.setattr("kvcomm.reuse.parts.cached_cost", lambda file, measure: ROWS_ONLY)
