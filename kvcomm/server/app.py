"""The application: surfaces, and what every request passes on its way to them.

From the outside in: the draining of bodies, traces, if anybody collects them, the log (ids, counts, last resort for
errors), what browsers are told about other origins, if any are allowed, the door (hosts, keys, rate, admission), the
body's limits, then FastAPI. A surface is a router; adding one is one line in `SURFACES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from kvcomm.engine.engine import Engine
from kvcomm.server import (
    admin,
    admin_tenants,
    anchors,
    chat,
    completions,
    dashboard,
    errors,
    health,
    models,
    openapi,
    stats,
    tokens,
)
from kvcomm.server.access import Door
from kvcomm.server.anthropic import surface as messages
from kvcomm.server.callers import Callers, cors_of
from kvcomm.server.contexts import snapshot_surface as snapshots
from kvcomm.server.contexts import surface as contexts
from kvcomm.server.contexts.snapshots import open_folder
from kvcomm.server.contexts.turns import NewId, new_id
from kvcomm.server.draining import DrainedBodies
from kvcomm.server.keys import KeyRing
from kvcomm.server.limits import BodyLimit
from kvcomm.server.logs import RequestLog
from kvcomm.server.responses import surface as responses
from kvcomm.server.segments import cache
from kvcomm.server.segments import surface as segments
from kvcomm.server.settings import ServerSettings
from kvcomm.server.state import ServerState
from kvcomm.server.traces import RequestTraces
from kvcomm.server.unknown_urls import UnknownUrls

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

SURFACES = (
    health.router,
    models.router,
    chat.router,
    completions.router,
    tokens.router,
    responses.router,
    messages.router,
    contexts.router,
    snapshots.router,
    segments.router,
    cache.router,
    anchors.router,
    stats.router,
    dashboard.router,
    admin.router,
    admin_tenants.router,
)


def make_app(
    engine: Engine,
    settings: ServerSettings | None = None,
    *,
    keys: KeyRing | None = None,
    traces: TracerProvider | None = None,
    new_id: NewId = new_id,
) -> FastAPI:
    """An app over an engine, which stays the caller's to close.

    Args:
        keys: by default those of the file in the settings; none there: no keys, one tenant.
        traces: where spans of requests go, and the caller's to shut down; None: there are none.
        new_id: makes the ids of contexts, and of responses, which share them; by default such as nobody guesses.

    Raises:
        KeyFileError: the settings name a key file that cannot be read.
        InvalidRequest: the folder for snapshots cannot be made or read, or every web page could use it without a key.
    """
    settings = settings or ServerSettings()
    if keys is None and settings.keys is not None:
        keys = KeyRing(settings.keys)
    settings.require_safe_origins(has_keys=keys is not None)
    if settings.snapshots is not None:
        open_folder(settings.snapshots)
    state = ServerState(engine, settings, keys, new_id=new_id)
    app = FastAPI(docs_url=None, redoc_url=None)  # their pages load scripts from elsewhere
    app.state.kvcomm = state
    for surface in SURFACES:
        app.include_router(surface)
    errors.install(app, unknown_url=UnknownUrls(SURFACES))
    openapi.install(app, models=lambda: state.models, vocab_size=engine.vocab_size)
    app.add_middleware(
        BodyLimit, max_bytes=settings.max_bytes_of, timeout_s=settings.body_timeout_s, pause_s=settings.body_pause_s
    )
    callers = Callers(
        allowed_hosts=settings.allowed_hosts, cors_origins=settings.cors_origins, has_keys=keys is not None
    )
    app.add_middleware(Door, keys=keys, callers=callers, tenant=state.tenants.get, admission=state.admission)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, **cors_of(settings))
    app.add_middleware(RequestLog, observe=state.ended)
    if traces is not None:
        app.add_middleware(RequestTraces, provider=traces)
    app.add_middleware(DrainedBodies)
    return app
