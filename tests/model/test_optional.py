"""What is said where a package is missing, and that other trouble with a package is not hidden behind it."""

from __future__ import annotations

import importlib

import pytest

from kvcomm.errors import InvalidRequest
from kvcomm.model.optional import needing


def test_a_package_that_is_missing_is_explained() -> None:
    with (
        pytest.raises(InvalidRequest, match=r"^install it$") as caught,
        needing("kvcomm_there_is_none", "install it"),
    ):
        importlib.import_module("kvcomm_there_is_none")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_other_trouble_with_an_import_is_not() -> None:
    with pytest.raises(ModuleNotFoundError, match="kvcomm_another"), needing("kvcomm_there_is_none", "install it"):
        importlib.import_module("kvcomm_another")


def test_what_is_there_is_imported() -> None:
    with needing("json", "install it"):
        found = importlib.import_module("json")
    assert found.loads("1") == 1
