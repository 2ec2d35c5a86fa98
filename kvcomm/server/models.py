"""`GET /v1/models`: the model that is served, and its adapters as models of their own; the same for every tenant."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from kvcomm.server.access import security
from kvcomm.server.errors import documented
from kvcomm.server.schemas.models import Model, ModelList
from kvcomm.server.state import ServerState, StateDep

router = APIRouter(tags=["OpenAI"], dependencies=[Depends(security)])


@router.get("/v1/models", operation_id="listModels", responses=documented(401, 403, 429, 500))
async def list_models(state: StateDep) -> ModelList:
    """The models that requests may name."""
    return ModelList(data=[_model(state, name) for name in state.models])


@router.get("/v1/models/{model:path}", operation_id="retrieveModel", responses=documented(401, 403, 404, 429, 500))
async def retrieve_model(model: str, state: StateDep) -> Model:
    """One of them."""
    return _model(state, state.adapter_of(model) or state.settings.name)


def _model(state: ServerState, name: str) -> Model:
    base = state.settings.name
    parent = None if name == base else base
    return Model(id=name, created=state.created, parent=parent, max_model_len=state.engine.max_context)
