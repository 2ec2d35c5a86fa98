"""The engines of tests that look at approximate reuse."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvcomm.engine.engine import Engine
from tests.engine.conftest import ROWS_ONLY, engine, shared_model
from tests.reuse.reading import SMALL_BANKS
from tests.tiny import TinyModel

__all__ = ["engine", "shared_model"]


@pytest.fixture
def learning(shared_model: TinyModel) -> Iterator[Engine]:
    """An engine that can learn to move text, on which only computed tokens take time."""
    with Engine(shared_model.model, shared_model.tokenizer, config=SMALL_BANKS) as made:
        made.reuse.parts.cost.model = ROWS_ONLY
        yield made
        made.check_integrity()
