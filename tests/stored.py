"""What tree and store of renditions hold: read through their views, and an engine's under its lock."""

from __future__ import annotations

from kvcomm.engine.engine import Engine
from kvcomm.memory.node import NamespaceUsage
from kvcomm.memory.renditions import Rendition, RenditionStore
from kvcomm.memory.segments import Segment


def stored_in(store: RenditionStore, namespace: str) -> list[Rendition]:
    """Every rendition of a namespace, exact or not."""
    return [rendition for view in store.views(namespace) for rendition in view.renditions]


def stored_by(engine: Engine, tenant: str = "default") -> list[Rendition]:
    """The same, of what an engine has."""
    with engine.lock:
        return stored_in(engine.memory.renditions, engine.namespace(tenant))


def renditions_by(engine: Engine, segment: Segment) -> tuple[Rendition, ...]:
    """What an engine has of one segment."""
    with engine.lock:
        return engine.memory.renditions.renditions_of(engine.namespace(), segment)


def cached_by(engine: Engine, namespace: str) -> NamespaceUsage:
    """Sizes and counters of what an engine has cached."""
    with engine.lock:
        return engine.tree.usage(namespace)
