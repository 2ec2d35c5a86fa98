"""How what is cached looks from outside: the segments of a prompt, and the tree of all that a tenant has.

Everything is read from the tenant's own namespaces, under the engine's lock, and counts as no use of the cache.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kvcomm.engine.engine import Engine
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.renditions import SegmentView
from kvcomm.memory.tree import NodeView
from kvcomm.server.schemas.cache import CachedSegment, CacheNode, CacheTree
from kvcomm.server.segments.prepared import PlacedSegment, num_cached_of

MAX_NODES, MAX_DEPTH = 2000, 48
"""Of an answer: JSON readers refuse nesting without end."""

LABEL_TOKENS = 12
ID_DIGITS = 16


def cached_segments(placed: Sequence[PlacedSegment], num_cached: int) -> list[CachedSegment]:
    """The segments of a request of which the first `num_cached` tokens are cached."""
    return [
        CachedSegment(id=each.id, hash=each.digest, tokens=each.num_tokens, cached_tokens=cached)
        for each, cached in zip(placed, num_cached_of(placed, num_cached), strict=True)
    ]


def cache_tree(engine: Engine, name: str, spaces: Iterable[str]) -> CacheTree:
    """What a tenant has cached, over all its spaces; the one that is called as the tenant needs no salt."""
    builder = _TreeBuilder(engine)
    root = _node("root", name, "root")
    num_tokens = num_pages = 0
    with engine.cache.unchanged():
        for space in spaces:
            parent = root if space == name else builder.salt(root, engine.home(space))
            for namespace in engine.tenancy.namespaces(space):  # one for each adapter
                usage = engine.cache.usage(namespace)
                num_tokens, num_pages = num_tokens + usage.num_tokens, num_pages + usage.num_pages
                parent["children"] += builder.prefixes(namespace) + builder.segments(namespace)
    tree = CacheNode.model_validate(_summed(root))
    num_bytes = num_pages * engine.cache.page_bytes
    return CacheTree(bytes=num_bytes, tokens=num_tokens, left_out=builder.num_left_out, root=tree)


class _TreeBuilder:
    """Makes nodes as JSON values, a bounded number of them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._token_bytes = engine.cache.page_bytes // engine.config.page_size
        self._num_nodes = 0
        self.num_left_out = 0

    def salt(self, root: dict[str, Any], namespace: str) -> dict[str, Any]:
        """A node for the requests with one salt, whose name stays the clients'."""
        node = _node(namespace[:ID_DIGITS], None, "salt")
        root["children"].append(node)
        return node

    def prefixes(self, namespace: str) -> list[dict[str, Any]]:
        """The radix tree below a namespace."""
        top = _node(namespace, None, "prefix")
        path = [top]  # the node of every depth down to where the walk is
        for view in self._engine.cache.prefixes(namespace):
            if view.depth >= len(path) + 1 or view.depth > MAX_DEPTH or not self._has_room():
                self.num_left_out += 1
                del path[view.depth :]
                continue
            node = self._prefix(path[view.depth - 1]["id"], view)
            path[view.depth - 1]["children"].append(node)
            path[view.depth :] = [node]
        return list(top["children"])

    def segments(self, namespace: str) -> list[dict[str, Any]]:
        """Every segment that has a rendition."""
        return list(self._segments(namespace))

    def _segments(self, namespace: str) -> Iterator[dict[str, Any]]:
        for view in self._engine.cache.segments(namespace):
            if not view.renditions:
                continue
            if not self._has_room():
                self.num_left_out += 1 + len(view.renditions)
                continue
            yield self._segment(view)

    def _segment(self, view: SegmentView) -> dict[str, Any]:
        slots = [rendition.slot for rendition in view.renditions]
        node = _node(view.digest[:ID_DIGITS], slots[-1] or None, "segment")
        node["last_used_s"] = view.seen_s - view.used_s
        node["expires_in_s"] = _finite(view.due_s - view.seen_s)
        for rendition in view.renditions:
            digest = hashlib.sha256(f"{view.digest} {rendition.signature} {rendition.start}".encode()).hexdigest()
            child = _node(digest[:ID_DIGITS], f"at token {rendition.start}", "rendition")
            child["tokens"], child["bytes"] = rendition.num_tokens, rendition.num_tokens * self._token_bytes
            child["fidelity"] = "exact" if rendition.fidelity is Fidelity.EXACT else "approximate"
            child["expires_in_s"] = node["expires_in_s"]
            child["last_used_s"] = view.seen_s - rendition.used_s
            node["children"].append(child)
        self._num_nodes += len(view.renditions)
        return node

    def _prefix(self, parent_id: str, view: NodeView) -> dict[str, Any]:
        digest = hashlib.sha256(parent_id.encode() + view.tokens.tobytes()).hexdigest()
        node = _node(digest[:ID_DIGITS], self._engine.texts.decode(view.tokens[:LABEL_TOKENS].tolist()), "prefix")
        node["tokens"], node["bytes"] = view.end - view.start, (view.end - view.start) * self._token_bytes
        node["pinned"], node["last_used_s"] = view.pinned, view.idle_s
        node["expires_in_s"] = _finite(view.expires_in_s)
        return node

    def _has_room(self) -> bool:
        self._num_nodes += 1
        return self._num_nodes <= MAX_NODES


def _node(id: str, label: str | None, kind: str) -> dict[str, Any]:
    return {
        "id": id,
        "label": label,
        "kind": kind,
        "tokens": 0,
        "bytes": 0,
        "fidelity": "exact",
        "last_used_s": None,
        "pinned": False,
        "expires_in_s": None,
        "children": [],
    }


def _summed(node: dict[str, Any]) -> dict[str, Any]:
    """The node with the sizes of its children where it has no tokens of its own, and approximate if one of them is."""
    if node["kind"] in ("prefix", "rendition"):
        return node
    children = [_summed(child) for child in node["children"]]
    for key in ("tokens", "bytes"):
        node[key] = sum(child[key] for child in children)
    if any(child["fidelity"] == "approximate" for child in children):
        node["fidelity"] = "approximate"
    return node


def _finite(seconds: float) -> float | None:
    return max(0.0, seconds) if math.isfinite(seconds) else None
