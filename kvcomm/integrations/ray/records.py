"""What outlives a replica of a context: its tokens, its conversation and its terms, as small objects in a store.

The KV itself is not here: whoever brings a context back computes it, or finds it in the tier, where exact prefixes are.
So an object takes a few bytes a token, is written before the answer that tells of the change ends, and is right however
much of the KV was saved. Objects are never changed: each change is a version of its own, written once, so that of two
replicas that both believe they have a context one finds that out. Names and seals need the tenant's key, derived from
the store's secret; an object that is not whole, sealed by another key, of another model or tenant is no object at all.

`ROOT` lies beside what the tier keeps: its janitor leaves these alone.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvcomm.engine.engine import DEFAULT_TENANT
from kvcomm.errors import KVCommError
from kvcomm.integrations.ray.pinning import pin_of
from kvcomm.tiers.store import ObjectStore

logger = logging.getLogger("kvcomm.ray")

ROOT = "kvcomm-contexts-1"
MAC_LENGTH = 64
NAME_LENGTH = 32
"""Hexadecimal digits of a seal, and of a part of a name."""

KEPT_VERSIONS = 2
"""Of one context: the latest, and the one before it for whoever must take the latest back."""

TokenIds = tuple[int, ...]


class ContextRecord(BaseModel):
    """A context as it was at one moment.

    Attributes:
        namespace: of the model that the tokens are of.
        version: counts changes from 1 on.
        used_s: when it was last used, in seconds since 1970.
        segments: name and token ids of each.
        note: its conversation; see `KeptConversation.note`.
        response: the JSON text of what it ends with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: str
    version: Annotated[int, Field(ge=1)]
    tenant: str
    namespace: str
    name: str | None
    salt: str | None
    adapter: str | None
    parent: str | None
    num_inherited: int
    is_pinned: bool
    is_spare: bool
    ttl_s: float
    used_s: float
    created: int
    segments: tuple[tuple[str | None, TokenIds], ...]
    note: str | None
    response: str | None

    def is_expired(self, now_s: float) -> bool:
        """Whether nobody used it for longer than it lives."""
        return not self.is_pinned and now_s > self.used_s + self.ttl_s


class Version(NamedTuple):
    """An object of a context."""

    key: str
    number: int


class ContextRecords:
    """The records of all tenants in a store. Safe to use from several threads, as the store is."""

    def __init__(self, store: ObjectStore, namespace: str, secret: bytes | None = None) -> None:
        """Args:
        namespace: of the model.
        secret: None: everybody who may read the store can name everything in it, so only the default tenant's
            contexts are kept.
        """
        self._store = store
        self._namespace = namespace
        self._secret = secret

    def serves(self, tenant: str) -> bool:
        """Whether that tenant's contexts are kept."""
        return self._secret is not None or tenant == DEFAULT_TENANT

    def put(self, record: ContextRecord) -> bool:
        """Write a version; False: there is one of that number already, written by somebody else.

        Raises:
            KVCommError: the store cannot be written.
        """
        key = self._key(record.tenant)
        text = record.model_dump_json().encode("utf-8", "surrogatepass")
        name = f"{self._folder(key, record.id)}{record.version:010d}"
        is_new = self._store.put_once(name, [_mac(key, name, text).encode(), text])
        if is_new and record.version > KEPT_VERSIONS:
            self._delete(f"{self._folder(key, record.id)}{record.version - KEPT_VERSIONS:010d}")
        return is_new

    def get(self, tenant: str, context_id: str, *, at: int | None = None) -> ContextRecord | None:
        """The latest version that is whole; None: there is none.

        Args:
            at: the version that counts; later ones are removed.

        Raises:
            KVCommError: the store cannot be read.
        """
        for version in sorted(self._versions(tenant, context_id), key=lambda each: -each.number):
            if at is not None and version.number > at:
                self._delete(version.key)
            elif (record := self._read(tenant, context_id, version)) is not None:
                return record
        return None

    def family(self, tenant: str, context_id: str) -> list[str]:
        """Names of all members of a context's family, itself included.

        Raises:
            KVCommError: the store cannot be read.
        """
        pin = pin_of(context_id)
        if pin is None:
            return []
        key = self._key(tenant)
        members: dict[str, None] = {}
        for found in self._store.list(f"{ROOT}/{_name(key, 'tenant')}/{_name(key, pin.family)}"):
            if (record := self._parsed(tenant, found.key)) is not None:
                members[record.id] = None
        return list(members)

    def remove(self, tenant: str, context_id: str) -> None:
        """Delete all versions; raises KVCommError when the store cannot."""
        for version in self._versions(tenant, context_id):
            self._store.delete(version.key)

    def _versions(self, tenant: str, context_id: str) -> list[Version]:
        prefix = self._folder(self._key(tenant), context_id)
        found = (each.key for each in self._store.list(prefix))
        return [Version(key, int(last)) for key in found if (last := key.removeprefix(prefix)).isdecimal()]

    def _read(self, tenant: str, context_id: str, version: Version) -> ContextRecord | None:
        record = self._parsed(tenant, version.key)
        if record is None or (record.id, record.version) != (context_id, version.number):
            return None
        return record

    def _parsed(self, tenant: str, name: str) -> ContextRecord | None:
        """What an object says, if it says it under its own name, for this tenant and this model."""
        try:
            whole = bytes(self._store.get(name))
        except KVCommError as error:
            logger.warning("a kept context cannot be read: %s", error)
            return None
        seal, text = whole[:MAC_LENGTH], whole[MAC_LENGTH:]
        if not hmac.compare_digest(seal, _mac(self._key(tenant), name, text).encode()):
            logger.warning("a kept context is damaged, or was kept with another secret: %s", name)
            return None
        try:
            record = ContextRecord.model_validate_json(text)
        except (ValidationError, ValueError) as error:
            logger.warning("a kept context is of another version of kvcomm: %s", error)
            return None
        return record if (record.tenant, record.namespace) == (tenant, self._namespace) else None

    def _delete(self, name: str) -> None:
        try:
            self._store.delete(name)
        except KVCommError as error:
            logger.warning("an old version of a kept context stays: %s", error)

    def _folder(self, key: bytes, context_id: str) -> str:
        pin = pin_of(context_id)
        family = context_id if pin is None else pin.family
        return f"{ROOT}/{_name(key, 'tenant')}/{_name(key, family)}/{_name(key, context_id)}/"

    def _key(self, tenant: str) -> bytes:
        secret = b"kvcomm contexts without a secret" if self._secret is None else self._secret
        return hmac.digest(secret, b"context" + tenant.encode(), "sha256")


def _name(key: bytes, what: str) -> str:
    return hmac.new(key, f"name {what}".encode(), hashlib.sha256).hexdigest()[:NAME_LENGTH]


def _mac(key: bytes, name: str, text: bytes) -> str:
    return hmac.new(key, json.dumps(name).encode() + text, hashlib.sha256).hexdigest()
