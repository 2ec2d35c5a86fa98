"""The engine of tests that compare ways to reuse."""

from tests.engine.conftest import engine, shared_model

__all__ = ["engine", "shared_model"]
