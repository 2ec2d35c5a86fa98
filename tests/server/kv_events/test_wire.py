"""The bytes of events: field by field as vLLM has them."""

from __future__ import annotations

from typing import Any

import msgspec

from kvcomm.server.kv_events.announcer import AllCleared, BlocksRemoved, BlocksStored, KVEvent
from kvcomm.server.kv_events.blocks import Owner
from kvcomm.server.kv_events.wire import Encoder, Form

HIGH = 2**64 - 1
PLAIN = BlocksStored([HIGH, 2], None, [5, 6, 7, 8], 0, Owner())
TENANT = BlocksStored([3, 4], 2, [5, 6, 7, 8], 0, Owner("team", "tone", "/adapters/tone"))


def decoded(form: Form, *events: KVEvent) -> Any:
    """A batch as any MessagePack reader sees it."""
    return msgspec.msgpack.decode(Encoder(form, block_size=2, medium="GPU").batch(events, 1.5))


def test_the_form_with_names() -> None:
    assert decoded("map", PLAIN, BlocksRemoved([HIGH]), AllCleared()) == [
        1.5,
        [
            {
                "type": "BlockStored",
                "block_hashes": [HIGH, 2],
                "parent_block_hash": None,
                "token_ids": [5, 6, 7, 8],
                "block_size": 2,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
                "extra_keys": [None, None],
                "group_idx": 0,
            },
            {"type": "BlockRemoved", "block_hashes": [HIGH], "medium": "GPU", "group_idx": 0},
            {"type": "AllBlocksCleared"},
        ],
        0,
    ]


def test_the_form_without_names() -> None:
    assert decoded("array", PLAIN, BlocksRemoved([1]), AllCleared()) == [
        1.5,
        [
            ["BlockStored", [HIGH, 2], None, [5, 6, 7, 8], 2, None, "GPU", None, [None, None], 0],
            ["BlockRemoved", [1], "GPU", 0],
            ["AllBlocksCleared"],
        ],
        0,
    ]


def test_extra_keys_come_without_their_kinds() -> None:
    _, (event,), _ = decoded("map", TENANT)
    assert (event["lora_name"], event["extra_keys"]) == ("tone", [["tone", "team"], ["tone"]])
    _, (event,), _ = decoded("map", TENANT._replace(first_index=3))
    assert event["extra_keys"] == [["tone"], ["tone"]]
