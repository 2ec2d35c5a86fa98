"""`/v1/models`, `/health`, `/ready` and `/version`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvcomm.server.schemas.common import ResponseModel


class Model(ResponseModel):
    """A model that requests may name; the same for every tenant."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kvcomm"
    parent: Annotated[str | None, Field(description="Of an adapter: the model that it belongs to.")] = None
    max_model_len: int


class ModelList(ResponseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]


class Status(ResponseModel):
    """Whether the server works."""

    status: Literal["ok"] = "ok"


class Version(ResponseModel):
    """What runs here."""

    version: str
