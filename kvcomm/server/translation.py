"""What APIs share that are layers over chat: their requests become chat requests, errors come back in their names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from kvcomm.server.errors import ApiError, invalid
from kvcomm.server.schemas.chat import ChatRequest

Names = Mapping[str, str]
"""Patterns of a chat request's parameters, from their beginning, and what another API calls what they match."""


def chat_of(fields: Mapping[str, Any], names: Names) -> ChatRequest:
    """A chat request of those fields that are not None.

    Args:
        names: what the API calls them that they come from.

    Raises:
        ApiError: 400, the chat surface does not take them.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return ChatRequest.model_validate(given)
    except ValidationError as error:
        errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise renamed(invalid(errors, given), names) from error


@contextmanager
def told_as(names: Names) -> Iterator[None]:
    """Raise the chat surface's errors with another API's names."""
    try:
        yield
    except ApiError as error:
        raise renamed(error, names) from error


def renamed(error: ApiError, names: Names) -> ApiError:
    """The same error, whose parameter is called as another API calls it."""
    if error.param is None:
        return error
    for pattern, name in names.items():
        if re.match(pattern, error.param):
            param = re.sub(pattern, name, error.param, count=1)
            message = error.detail.replace(error.param, param, 1)
            return ApiError(error.status_code, error.code, message, param=param, headers=error.headers)
    return error
