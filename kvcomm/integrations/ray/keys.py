"""What replicas could hold of a request, read from its JSON without a tokenizer.

Texts that begin alike have tokens that begin alike, so a chain of keys over the text says as much as one over tokens,
and the ingress needs neither the model's tokenizer nor its time. A prompt is a row of items: segments, tools, messages.
Every item ends a run, and so do every `RUN_BYTES` of it; the key of a run stands for all before it, for the tenant,
the model and the salt. A segment has a key of its own too where it may be moved. Lengths in tokens are estimates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from kvcomm.integrations.ray.routing import MovableText, PromptPrefix, Wanted

RUN_BYTES = 2048
BYTES_PER_TOKEN = 4
KEY_BYTES = 8
MAX_KEYS = 512
"""Runs of one request; what comes behind them is not looked at."""

BEFORE = ("tools", "system", "instructions")
PROMPTS = ("messages", "prompt", "input", "text", "token_ids")
"""Fields of bodies that hold a prompt, in the order in which prompts show them."""


class _Item(NamedTuple):
    """A part of a prompt; `name` tells movable ones apart from others."""

    text: bytes
    is_movable: bool = False


def wanted_of(body: Mapping[str, Any], *, tenant: str, may_move: bool = False) -> Wanted:
    """What of a request could be held somewhere.

    Args:
        body: JSON object of a request that computes; anything may be wrong with it.
        may_move: what the server allows where the request does not say.
    """
    moves = _moves(body.get("reuse"), may_move)
    digest = _digest(b"", _json([tenant, body.get("model"), body.get("cache_salt")]))
    runs: list[PromptPrefix] = []
    segments: list[MovableText] = []
    num_bytes = 0
    for item in _items(body):
        start = num_bytes
        for at in range(0, len(item.text), RUN_BYTES):
            piece = item.text[at : at + RUN_BYTES]
            digest = _digest(digest, piece)
            num_bytes += len(piece)
            if len(runs) < MAX_KEYS:
                runs.append(PromptPrefix(digest.hex(), _tokens(num_bytes)))
        if item.is_movable and moves:
            key = _digest(_json(["segment", tenant, body.get("model")]), item.text).hex()
            segments.append(MovableText(key, _tokens(start), _tokens(num_bytes)))
    return Wanted(_tokens(num_bytes), tuple(runs), tuple(segments))


def _items(body: Mapping[str, Any]) -> Iterator[_Item]:
    segments = body.get("segments")
    for each in segments if isinstance(segments, list) else ():
        yield _Item(_segment_text(each), is_movable=True)
    for name in BEFORE:
        if body.get(name):
            yield _Item(_json([name, body[name]]))
    for name in PROMPTS:
        value = body.get(name)
        if isinstance(value, list) and value and not isinstance(value[0], int):
            for each in value:
                yield _Item(_json(each))
        elif isinstance(value, str):
            yield _Item(value.encode("utf-8", "surrogatepass"))
        elif value:
            yield _Item(_json(value))


def _segment_text(segment: Any) -> bytes:
    """What makes a segment the one that it is: its text, or the name that stands for one."""
    if not isinstance(segment, dict):
        return _json(segment)
    return _json([segment.get(name) for name in ("content", "name", "version")])


def _moves(reuse: Any, may_move: bool) -> bool:
    """Whether a request allows text to be moved: `reuse` as our requests have it."""
    if not isinstance(reuse, dict):
        return may_move
    return reuse.get("mode") != "exact" and reuse.get("max_divergence") != 0


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, default=str).encode()


def _digest(before: bytes, text: bytes) -> bytes:
    return hashlib.blake2b(before + text, digest_size=KEY_BYTES).digest()


def _tokens(num_bytes: int) -> int:
    return -(-num_bytes // BYTES_PER_TOKEN)
