"""What a store of renditions holds, read through its views."""

from __future__ import annotations

from kvcomm.memory.renditions import Rendition, RenditionStore


def stored_in(store: RenditionStore, namespace: str) -> list[Rendition]:
    """Every rendition of a namespace, exact or not."""
    return [rendition for view in store.views(namespace) for rendition in view.renditions]
