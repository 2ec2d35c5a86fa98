"""`/health`, `/ready` and `/version`: for whoever keeps the server running. They need no key and tell nothing else."""

from __future__ import annotations

from fastapi import APIRouter

from kvcomm import __version__
from kvcomm.server.errors import ApiError, documented
from kvcomm.server.schemas.models import Status, Version
from kvcomm.server.state import StateDep

router = APIRouter(tags=["operation"])


@router.get("/health", operation_id="health", responses=documented(500, 503))
async def health(state: StateDep) -> Status:
    """Whether the engine lives; 503 when the process should be replaced."""
    if state.is_engine_closed:
        raise ApiError(503, "engine_closed", "the engine has stopped", retry_after_s=state.settings.retry_after_s)
    return Status()


@router.get("/ready", operation_id="ready", responses=documented(500, 503))
async def ready(state: StateDep) -> Status:
    """Whether requests should be sent here now; 503 while the server is full or about to stop."""
    state.admission.require_open()
    return await health(state)


@router.get("/version", operation_id="version", responses=documented(500))
async def version() -> Version:
    """What runs here."""
    return Version(version=__version__)
