"""`/metrics` and `/admin/*`: for the operator, with a key of its own; only here are tenants seen together."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import Response

from kvcomm.server.access import security
from kvcomm.server.errors import ApiError, documented
from kvcomm.server.keys import NAME_PATTERN
from kvcomm.server.removal import status_of
from kvcomm.server.schemas.admin import Cleared, ServerStatus
from kvcomm.server.state import StateDep

router = APIRouter(tags=["operator"], dependencies=[Depends(security)])


@router.get(
    "/metrics",
    operation_id="metrics",
    response_class=Response,
    responses={
        200: {"content": {CONTENT_TYPE_PLAIN_0_0_4.split(";")[0]: {"schema": {"type": "string"}}}},
        **documented(401, 403, 500),
    },
)
def metrics(state: StateDep) -> Response:
    """Counters and histograms in Prometheus' text format."""
    return Response(state.metrics.exposition(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


@router.get("/admin/status", operation_id="serverStatus", responses=documented(401, 403, 500))
def server_status(state: StateDep) -> ServerStatus:  # in a thread: it waits for the engine's lock
    """How full the server is."""
    stats = state.engine.cache.stats()
    return ServerStatus(
        is_draining=state.admission.is_draining,
        requests_in_flight=state.admission.num_in_flight,
        requests_running=state.engine.requests.num_running,
        requests_waiting=state.engine.requests.num_waiting + state.workers.engine.num_waiting,
        num_pages=stats.num_pages,
        num_free_pages=stats.num_free,
        num_cached_pages=stats.num_cached,
        page_bytes=stats.page_bytes,
        tenants=[status_of(state, name) for name in state.tenants.names],
    )


@router.delete(
    "/admin/tenants/{tenant}/cache", operation_id="clearCache", responses=documented(400, 401, 403, 404, 500)
)
async def clear_cache(tenant: Annotated[str, Path(pattern=NAME_PATTERN)], state: StateDep) -> Cleared:
    """Drop a tenant's cached prefixes; what is in use stays until it is not."""
    if tenant not in state.tenants.names:
        raise ApiError(404, "tenant_not_found", f"no tenant {tenant!r} has asked for anything", param="tenant")
    state.prompts.texts.forget(tenant)
    return Cleared(cleared_tokens=state.tenants.clear(state.tenants.get(tenant)))
