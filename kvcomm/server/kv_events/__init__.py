"""KV events: routers are told which prefixes are cached here, in the words of vLLM.

From the inside out: `blocks` names blocks of tokens as vLLM does, `announcer` turns what the radix tree tells into
vLLM's events, `wire` makes bytes of them, `publisher` sends those, and `feed` is the thread that drives all of it. Only
what is in the tree is announced, and only exact KV ever is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcomm.starting import lazily

if TYPE_CHECKING:
    from kvcomm.server.kv_events.announcer import AllCleared, Announcer, BlocksRemoved, BlocksStored, KVEvent
    from kvcomm.server.kv_events.blocks import DEFAULT_SEED, Owner, as_int, block_hash, root_hash
    from kvcomm.server.kv_events.publisher import require_extra
    from kvcomm.server.kv_events.wire import Encoder, Form

__all__ = [
    "DEFAULT_SEED",
    "AllCleared",
    "Announcer",
    "BlocksRemoved",
    "BlocksStored",
    "Encoder",
    "Form",
    "KVEvent",
    "Owner",
    "as_int",
    "block_hash",
    "require_extra",
    "root_hash",
]

_HOMES = {
    "AllCleared": "kvcomm.server.kv_events.announcer",
    "Announcer": "kvcomm.server.kv_events.announcer",
    "BlocksRemoved": "kvcomm.server.kv_events.announcer",
    "BlocksStored": "kvcomm.server.kv_events.announcer",
    "DEFAULT_SEED": "kvcomm.server.kv_events.blocks",
    "Encoder": "kvcomm.server.kv_events.wire",
    "Form": "kvcomm.server.kv_events.wire",
    "KVEvent": "kvcomm.server.kv_events.announcer",
    "Owner": "kvcomm.server.kv_events.blocks",
    "as_int": "kvcomm.server.kv_events.blocks",
    "block_hash": "kvcomm.server.kv_events.blocks",
    "require_extra": "kvcomm.server.kv_events.publisher",
    "root_hash": "kvcomm.server.kv_events.blocks",
}

__getattr__ = lazily(__name__, _HOMES)
