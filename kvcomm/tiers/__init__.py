"""The shared tier: KV that outlives a process and is read by others, in a folder, a bucket or Redis.

`store` and its kinds know bytes by name, `record` what one object holds, `keys` what it is called, `pace` what it
costs; `Tier` joins them. Nothing here knows pools, engines or requests. Whatever a tier does, or fails to do, is a
miss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcomm.starting import lazily

if TYPE_CHECKING:
    from kvcomm.memory.pool import LayerShape
    from kvcomm.tiers.janitor import sweep
    from kvcomm.tiers.opening import open_store
    from kvcomm.tiers.space import KV, TierMiss, TierSpace
    from kvcomm.tiers.store import ObjectStore, StoredObject
    from kvcomm.tiers.tier import Tier

__all__ = [
    "KV",
    "LayerShape",
    "ObjectStore",
    "StoredObject",
    "Tier",
    "TierMiss",
    "TierSpace",
    "open_store",
    "sweep",
]

_HOMES = {
    "KV": "kvcomm.tiers.space",
    "LayerShape": "kvcomm.memory.pool",
    "ObjectStore": "kvcomm.tiers.store",
    "StoredObject": "kvcomm.tiers.store",
    "Tier": "kvcomm.tiers.tier",
    "TierMiss": "kvcomm.tiers.space",
    "TierSpace": "kvcomm.tiers.space",
    "open_store": "kvcomm.tiers.opening",
    "sweep": "kvcomm.tiers.janitor",
}

__getattr__ = lazily(__name__, _HOMES)
