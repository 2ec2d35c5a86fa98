"""Order of the tests of vLLM's integration."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM itself first: when it starts it looks into all modules, and one of llvmlite's, which kvcomm's loops bring in
    later, answers that with an error."""
    items.sort(key=lambda item: item.path.name != "test_in_vllm.py")
