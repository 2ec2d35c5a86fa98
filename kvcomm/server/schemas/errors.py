"""Errors in OpenAI's shape."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kvcomm.server.schemas.common import ResponseModel


class ErrorDetail(ResponseModel):
    """What went wrong."""

    message: str
    type: str
    param: Annotated[str | None, Field(description="The field at fault, where one is.")] = None
    code: str | None = None


class ErrorResponse(ResponseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail
