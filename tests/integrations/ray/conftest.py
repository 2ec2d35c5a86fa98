"""A tiny model for each file."""

from __future__ import annotations

import pytest

from tests.tiny import TinyModel, tiny_model


@pytest.fixture(scope="module")
def tiny() -> TinyModel:
    """One random model; nobody changes it."""
    return tiny_model()
