"""A model folder for evaluations, as a user would name one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama and its tokenizer on disk; up to 512 tokens. Tests never change it."""
    folder = tmp_path_factory.mktemp("tiny")
    made = tiny_model()
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder
