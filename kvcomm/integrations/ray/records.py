"""What outlives a replica of a context: its tokens, its conversation and its terms, as small objects in a store.

The KV itself is not here: whoever brings a context back computes it, or finds it in the tier, where exact prefixes are.
So an object takes a few bytes a token, is written before the answer that tells of the change ends, and is right however
much of the KV was saved. Objects are never changed: each change is a version of its own, written once, so that of two
replicas that both believe they have a context one finds that out. Records of another model are none.
"""

from __future__ import annotations

import logging
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvcomm.errors import KVCommError
from kvcomm.integrations.ray.pinning import pin_of
from kvcomm.integrations.ray.sealed import SealedObjects

logger = logging.getLogger("kvcomm.ray")

CONTEXTS = "contexts"
KEPT_VERSIONS = 2
"""Of one context: the latest, and the one before it for whoever must take the latest back."""

TokenIds = tuple[int, ...]


class ContextRecord(BaseModel):
    """A context as it was at one moment.

    Attributes:
        namespace: of the model that the tokens are of.
        version: counts changes from 1 on.
        nonce: of the request that made this version, where that was one that changes the context; see
            `ForwardedRequest`.
        used_s: when it was last used, in seconds since 1970.
        segments: name and token ids of each.
        note: its conversation; see `KeptConversation.note`.
        response: the JSON text of what it ends with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    version: Annotated[int, Field(ge=1)]
    nonce: str
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


class _Version(NamedTuple):
    """An object of a context."""

    name: str
    number: int


class ContextRecords:
    """The records of all tenants. Safe to use from several threads."""

    def __init__(self, objects: SealedObjects, namespace: str) -> None:
        """`namespace`: of the model."""
        self._objects = objects
        self._namespace = namespace

    def serves(self, tenant: str) -> bool:
        """Whether that tenant's contexts are kept."""
        return self._objects.serves(tenant)

    def put(self, record: ContextRecord) -> bool:
        """Write a version; False: there is another one of that number already.

        Raises:
            KVCommError: the store cannot be written.
        """
        folder = self._folder(record.tenant, record.id)
        name = _name(folder, record.version)
        if not self._objects.put(record.tenant, name, record.model_dump_json().encode()):
            there = self._read(record.tenant, name)  # maybe written by us, and only the answer was lost
            return there is not None and there.model_copy(update={"used_s": record.used_s}) == record
        if record.version > KEPT_VERSIONS:
            self._objects.clear(_name(folder, record.version - KEPT_VERSIONS))
        return True

    def get(self, tenant: str, context_id: str, *, at: int | None = None) -> ContextRecord | None:
        """The latest version that is whole; None: there is none.

        Args:
            at: the version that counts; later ones are removed.

        Raises:
            KVCommError: the store cannot be read.
        """
        for version in sorted(self._versions(tenant, context_id), key=lambda each: -each.number):
            if at is not None and version.number > at:
                self._objects.remove(version.name)
                continue
            record = self._read(tenant, version.name)
            if record is not None and (record.id, record.version) == (context_id, version.number):
                return record
        return None

    def family(self, tenant: str, context_id: str) -> list[str]:
        """Ids of all members of a context's family that were kept, itself included.

        Raises:
            KVCommError: the store cannot be read.
        """
        pin = pin_of(context_id)
        if pin is None:
            return []
        names = self._objects.names(self._objects.folder(tenant, CONTEXTS, pin.family))
        return list(dict.fromkeys(each.id for each in (self._read(tenant, name) for name in names) if each is not None))

    def remove(self, tenant: str, context_id: str) -> None:
        """Delete all versions; raises KVCommError when the store cannot."""
        for version in self._versions(tenant, context_id):
            self._objects.remove(version.name)

    def _versions(self, tenant: str, context_id: str) -> list[_Version]:
        names = self._objects.names(self._folder(tenant, context_id))
        found = ((name, name.rpartition("/")[2]) for name in names)
        return [_Version(name, int(last)) for name, last in found if last.isdecimal()]

    def _read(self, tenant: str, name: str) -> ContextRecord | None:
        """What an object says, if it says it of this tenant and this model; a lost one says nothing."""
        try:
            text = self._objects.get(tenant, name)
            record = None if text is None else ContextRecord.model_validate_json(text)
        except KVCommError as error:
            logger.warning("a kept context cannot be read: %s", error)
            return None
        except ValidationError as error:
            logger.warning("a kept context is of another version of kvcomm: %s", error.errors()[0]["msg"])
            return None
        if record is None or (record.tenant, record.namespace) != (tenant, self._namespace):
            return None
        return record

    def _folder(self, tenant: str, context_id: str) -> str:
        pin = pin_of(context_id)
        family = context_id if pin is None else pin.family
        return self._objects.folder(tenant, CONTEXTS, family, context_id)


def _name(folder: str, version: int) -> str:
    return f"{folder}{version:010d}"
