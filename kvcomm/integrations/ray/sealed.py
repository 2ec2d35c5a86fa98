"""Small objects of tenants in a store that replicas share: under names and seals that need the tenant's key.

The key is derived from the tier's secret. Without a secret everybody who may read the store could name everything in
it, so only the default tenant has objects then. What is not whole, or sealed under another name or key, is no object.
`ROOT` lies beside what the tier keeps: its janitor leaves these alone.
"""

from __future__ import annotations

import hashlib
import hmac
import logging

from kvcomm.errors import KVCommError
from kvcomm.tiers.space import DEFAULT_TENANT
from kvcomm.tiers.store import ObjectStore

logger = logging.getLogger("kvcomm.ray")

ROOT = "kvcomm-ray-1"
SEAL_BYTES = 32
NAME_LENGTH = 32
"""Hexadecimal digits of a part of a name."""

NO_SECRET = b"kvcomm on Ray without a secret"


class SealedObjects:
    """Objects by tenant and name. Safe to use from several threads, as the store is."""

    def __init__(self, store: ObjectStore, secret: bytes | None = None) -> None:
        """`secret`: of all who share the store."""
        self._store = store
        self._secret = secret

    def serves(self, tenant: str) -> bool:
        """Whether that tenant may have objects."""
        return self._secret is not None or tenant == DEFAULT_TENANT

    def folder(self, tenant: str, *parts: str) -> str:
        """What names of objects begin with that belong together; tells nothing about tenant and parts."""
        key = self._key(tenant)
        return "/".join((ROOT, *(_digest(key, "/".join(parts[:end])) for end in range(len(parts) + 1)), ""))

    def put(self, tenant: str, name: str, content: bytes) -> bool:
        """Write an object; False: there is one of that name already.

        Raises:
            KVCommError: the store cannot be written.
        """
        return self._store.put_once(name, [self._seal(tenant, name, content), content])

    def get(self, tenant: str, name: str) -> bytes | None:
        """An object that is what its writer wrote; None: there is none.

        Raises:
            KVCommError: the store cannot be read, or has lost the object since it was listed.
        """
        whole = bytes(self._store.get(name))
        seal, content = whole[:SEAL_BYTES], whole[SEAL_BYTES:]
        if hmac.compare_digest(seal, self._seal(tenant, name, content)):
            return content
        logger.warning("an object is damaged, or was written with another secret: %s", name)
        return None

    def names(self, folder: str) -> list[str]:
        """Names of all objects in a folder and in those below. Raises KVCommError: they cannot be listed."""
        return [found.key for found in self._store.list(folder.rstrip("/"))]

    def remove(self, name: str) -> None:
        """Delete an object, if it is there; raises KVCommError when it cannot be."""
        self._store.delete(name)

    def clear(self, name: str) -> None:
        """The same for one that is of no use any more: where it cannot be deleted, the log says so."""
        try:
            self._store.delete(name)
        except KVCommError as error:
            logger.warning("an object of no use stays: %s", error)

    def _key(self, tenant: str) -> bytes:
        return hmac.digest(self._secret or NO_SECRET, b"tenant " + tenant.encode(), "sha256")

    def _seal(self, tenant: str, name: str, content: bytes) -> bytes:
        sealing = hmac.new(self._key(tenant), b"seal " + name.encode() + b"\0", hashlib.sha256)
        sealing.update(content)
        return sealing.digest()


def _digest(key: bytes, what: str) -> str:
    return hmac.new(key, b"name " + what.encode(), hashlib.sha256).hexdigest()[:NAME_LENGTH]
