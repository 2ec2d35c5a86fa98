"""Which replica has a context: what its id says, and who took its family over.

An id is `ctx_`, the tag of the replica that made the first of a family (6 hexadecimal digits), the family (8) and what
nobody guesses (10). Forks, and responses that follow one another, belong to the family of the first, so that they share
its KV wherever they go. While the replica with the tag lives, it has the family; when it is gone, whoever has restored
a member has all of them, and until somebody has, rendezvous hashing of the family says who will: every router that
knows the same replicas decides the same.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from typing import NamedTuple

from kvcomm.integrations.ray.routing import rendezvous

TAG, FAMILY, REST = 6, 8, 10
"""Hexadecimal digits of an id's parts."""

PINNED = re.compile(rf"(?:ctx|resp)_([0-9a-f]{{{TAG}}})([0-9a-f]{{{FAMILY}}})[0-9a-f]{{{REST}}}")


class Pin(NamedTuple):
    """What an id says about where its context is."""

    tag: str
    family: str


def tag_of(replica: str) -> str:
    """What ids made by a replica begin with."""
    return hashlib.blake2b(replica.encode(), digest_size=TAG // 2).hexdigest()


def pin_of(context_id: str) -> Pin | None:
    """What the id of a context or response says; None: it is none."""
    found = PINNED.fullmatch(context_id)
    return None if found is None else Pin(found[1], found[2])


class PinnedIds:
    """Makes the ids of one replica's contexts."""

    def __init__(self, replica: str) -> None:
        self._tag = tag_of(replica)

    def __call__(self, parent: str | None) -> str:
        """A new id, of the parent's family if there is a parent."""
        pin = None if parent is None else pin_of(parent)
        tag, family = (self._tag, secrets.token_hex(FAMILY // 2)) if pin is None else pin
        return f"ctx_{tag}{family}{secrets.token_hex(REST // 2)}"


def owner(pin: Pin, replicas: Iterable[str], heir: str | None) -> str | None:
    """The replica that has a context, or should restore it; None where there is no replica.

    Args:
        replicas: that live.
        heir: that has taken the family over, which may be gone by now; None: nobody is known.
    """
    living = sorted(replicas)
    maker = next((replica for replica in living if tag_of(replica) == pin.tag), None)
    if maker is not None:
        return maker
    if heir in living:
        return heir
    return max(living, key=lambda replica: rendezvous(pin.family, replica), default=None)
