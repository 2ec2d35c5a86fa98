"""API keys: a file of hashes, and the ring that tells whose key a request carries.

A key is 256 random bits, shown once when it is made; the file holds its SHA-256, which needs no salt for that much
randomness. A key belongs to a tenant, whose name is what the cache is divided by, or it is an admin's or a metrics
reader's. The ring compares with every hash in constant time, and reads the file again when it has changed, so keys can
be added and removed while the server runs. The format is in the docstring of `KeyFile`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvcomm.errors import InvalidRequest, KeyFileError
from kvcomm.files.reading import CONFIG_BYTES, first_fault, read_bytes
from kvcomm.files.writing import replacing, sweep
from kvcomm.server.settings import Limits

logger = logging.getLogger("kvcomm.server")

KEY_PREFIX = "kv-"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
CHECK_INTERVAL_S = 1.0

Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class Role(StrEnum):
    """What a key opens."""

    TENANT = "tenant"
    """`/v1/*`, for one tenant."""
    ADMIN = "admin"
    """`/admin/*` and `/metrics`."""
    METRICS = "metrics"
    """`/metrics`."""


class KeyRecord(BaseModel):
    """One key, without the key.

    Attributes:
        name: of the key, unique in its file.
        tenant: whose cache, contexts and quota it uses; None for keys of other roles.
        sha256: hex digest of the key.
        created: ISO 8601, UTC.
        limits: of the tenant; None: the server's. Where several keys of a tenant say different things, the first one's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    role: Role = Role.TENANT
    tenant: Name | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: str
    limits: Limits | None = None


class KeyFile(BaseModel):
    """The file: JSON, `{"version": 1, "keys": [...]}`, readable by its owner only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    keys: tuple[KeyRecord, ...] = ()

    @classmethod
    def read(cls, file: str | Path) -> KeyFile:
        """Raises KeyFileError when there is none, it cannot be read, or it is not such a file."""
        file = Path(file)
        try:
            return cls.model_validate_json(read_bytes(file, max_bytes=CONFIG_BYTES))
        except OSError as error:
            raise KeyFileError(f"key file {file} cannot be read: {error.strerror or error}") from error
        except ValidationError as error:
            raise KeyFileError(f"{file} is not a key file: {first_fault(error)}") from error

    def write(self, file: str | Path) -> None:
        """Replace the file in one step.

        Raises:
            KeyFileError: it cannot be written; what was there is untouched.
        """
        file = Path(file)
        text = json.dumps(self.model_dump(mode="json", exclude_none=True), indent=2) + "\n"
        try:
            with replacing(file) as temporary:  # mode 0600
                temporary.write_text(text)
        except OSError as error:
            raise KeyFileError(f"key file {file} cannot be written: {error.strerror or error}") from error


@contextmanager
def changing(file: str | Path) -> Iterator[KeyFile]:
    """The key file, empty if there is none, kept from other processes that would change it too.

    Raises:
        KeyFileError: it cannot be read, or nothing can be written beside it.
    """
    file = Path(file)
    lock = FileLock(f"{file}.lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter where a disk knows no locks
        raise KeyFileError(f"key file {file} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    try:
        sweep(file.parent, file.name)
        yield _read_or_empty(file)
    finally:
        lock.release()


def _read_or_empty(file: Path) -> KeyFile:
    try:
        return KeyFile.read(file)
    except KeyFileError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return KeyFile()
        raise


def add_key(
    file: str | Path,
    name: str,
    *,
    role: Role = Role.TENANT,
    tenant: str | None = None,
    limits: Limits | None = None,
) -> str:
    """Make a key and write its hash; returns the key, which is kept nowhere.

    Args:
        tenant: None: a tenant of the same name.

    Raises:
        InvalidRequest: the name is taken or not a name, or a tenant or limits for a key that is nobody's.
        KeyFileError: the file cannot be read or written.
    """
    if role is not Role.TENANT and (tenant is not None or limits is not None):
        raise InvalidRequest(f"a key with the role {role.value!r} belongs to no tenant and has no limits")
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    try:
        record = KeyRecord(
            name=name,
            role=role,
            tenant=(tenant or name) if role is Role.TENANT else None,
            sha256=digest(key),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            limits=limits,
        )
    except ValidationError as error:
        bad = error.errors(include_url=False)[0]["input"]
        raise InvalidRequest(f"{bad!r} is not a name: letters, digits, '_', '.', '-', 64 at most") from error
    with changing(file) as old:
        if any(each.name == name for each in old.keys):
            raise InvalidRequest(f"{file} has a key named {name!r} already; remove it first or take another name")
        KeyFile(keys=(*old.keys, record)).write(file)
    return key


def remove_key(file: str | Path, name: str) -> KeyRecord:
    """Take a key out of the file; a running server stops accepting it within a second.

    Raises:
        InvalidRequest: there is no such key.
        KeyFileError: the file cannot be read or written.
    """
    with changing(file) as old:
        found = next((each for each in old.keys if each.name == name), None)
        if found is None:
            known = ", ".join(each.name for each in old.keys) or "none"
            raise InvalidRequest(f"{file} has no key named {name!r}; there are: {known}")
        KeyFile(keys=tuple(each for each in old.keys if each.name != name)).write(file)
    return found


def digest(key: str) -> str:
    """SHA-256 (hex) of a key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


class KeyRing:
    """The keys of a file, as it is now."""

    def __init__(self, file: str | Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises KeyFileError when the file cannot be read; later, the keys read last stay valid."""
        self._file = file = Path(file)
        self._clock = clock
        self._lock = threading.Lock()
        self._stamp = _stamp(file)
        self._records = KeyFile.read(file).keys
        self._checked_s = clock()
        self._counted: tuple[KeyRecord, ...] | None = None
        self._num_tenants = 0

    @property
    def records(self) -> tuple[KeyRecord, ...]:
        """Every key."""
        self._reload()
        return self._records

    @property
    def num_tenants(self) -> int:
        """Tenants that have a key."""
        records = self.records
        if records is not self._counted:
            self._counted = records
            self._num_tenants = len({record.tenant for record in records if record.tenant is not None})
        return self._num_tenants

    def find(self, presented: str) -> KeyRecord | None:
        """Whose key this is; takes as long for a wrong key as for any right one."""
        wanted = digest(presented).encode()
        found: KeyRecord | None = None
        for record in self.records:
            if hmac.compare_digest(wanted, record.sha256.encode()):
                found = record
        return found

    def limits_of(self, tenant: str) -> Limits | None:
        """What the first of the tenant's keys that has limits says."""
        return next((each.limits for each in self.records if each.tenant == tenant and each.limits), None)

    def has_tenant(self, tenant: str) -> bool:
        """Whether some key is that tenant's."""
        return any(each.tenant == tenant for each in self.records)

    def _reload(self) -> None:
        now = self._clock()
        if now - self._checked_s < CHECK_INTERVAL_S:
            return
        with self._lock:
            self._checked_s, before, self._stamp = now, self._stamp, _stamp(self._file)
            if self._stamp == before:
                return
            try:
                self._records = KeyFile.read(self._file).keys
            except KeyFileError as error:  # told once; the next change of the file is another chance
                logger.warning("keys stay as they were: %s", error)


def _stamp(file: Path) -> tuple[Any, ...] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
