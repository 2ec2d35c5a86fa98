"""Packages that a choice needs and an installation may lack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvcomm.errors import InvalidRequest


@contextmanager
def needing(package: str, refusal: str) -> Iterator[None]:
    """Import something that needs a package; what else is missing, such as a part of that package, is not explained.

    Raises:
        InvalidRequest: with the refusal, as the package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise InvalidRequest(refusal) from error
