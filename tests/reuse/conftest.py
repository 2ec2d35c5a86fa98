"""The engine of tests that look at approximate reuse."""

from tests.engine.conftest import engine, shared_model

__all__ = ["engine", "shared_model"]
