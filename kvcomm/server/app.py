"""The application: surfaces, and what every request passes on its way to them.

From the outside in: traces, if anybody collects them, the log (ids, counts, last resort for errors), the door (keys,
rate, admission), the body's limits, then FastAPI. A surface is a router; adding one is one line in `SURFACES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI

from kvcomm.engine.engine import Engine
from kvcomm.server import admin, anchors, chat, completions, dashboard, errors, health, models, openapi, stats
from kvcomm.server.access import Door
from kvcomm.server.contexts import snapshot_surface as snapshots
from kvcomm.server.contexts import surface as contexts
from kvcomm.server.contexts.snapshots import make_folder
from kvcomm.server.keys import KeyRing
from kvcomm.server.limits import BodyLimit
from kvcomm.server.logs import RequestLog
from kvcomm.server.segments import cache
from kvcomm.server.segments import surface as segments
from kvcomm.server.settings import ServerSettings
from kvcomm.server.state import ServerState
from kvcomm.server.traces import RequestTraces

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

SURFACES = (
    health.router,
    models.router,
    chat.router,
    completions.router,
    contexts.router,
    snapshots.router,
    segments.router,
    cache.router,
    anchors.router,
    stats.router,
    dashboard.router,
    admin.router,
)


def make_app(
    engine: Engine,
    settings: ServerSettings | None = None,
    *,
    keys: KeyRing | None = None,
    traces: TracerProvider | None = None,
) -> FastAPI:
    """An app over an engine, which stays the caller's to close.

    Args:
        keys: by default those of the file in the settings; none there: no keys, one tenant.
        traces: where spans of requests go, and the caller's to shut down; None: there are none.

    Raises:
        KeyFileError: the settings name a key file that cannot be read.
        InvalidRequest: the folder for snapshots cannot be made.
    """
    settings = settings or ServerSettings()
    if keys is None and settings.keys is not None:
        keys = KeyRing(settings.keys)
    if settings.snapshots is not None:
        make_folder(settings.snapshots)
    state = ServerState(engine, settings, keys)
    app = FastAPI(docs_url=None, redoc_url=None)  # their pages load scripts from elsewhere
    app.state.kvcomm = state
    for surface in SURFACES:
        app.include_router(surface)
    errors.install(app)
    openapi.install(app, models=lambda: state.models, vocab_size=engine.geometry.vocab_size)
    app.add_middleware(BodyLimit, max_bytes=settings.max_bytes_of, timeout_s=settings.body_timeout_s)
    app.add_middleware(Door, keys=keys, tenant=state.tenants.get, admission=state.admission)
    app.add_middleware(RequestLog, observe=state.metrics.answered)
    if traces is not None:
        app.add_middleware(RequestTraces, provider=traces)
    return app
