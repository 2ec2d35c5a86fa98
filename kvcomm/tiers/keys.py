"""What objects are called: names that nobody can make who does not have the tenant's secret.

A tier's secret gives each tenant a key (HMAC over its name); all names of a tenant's objects, those of their folders
too, are HMACs under that key over what the object is. So a worker that has only other tenants' keys can neither name
nor list them, and two tenants' equal prompts have nothing in common. Whoever may list the whole bucket sees how many
objects there are and may read them: that right is its owner's. Records are sealed under the same key, so that nobody
without it can put KV in a tenant's way.

Without a secret everybody could name everybody's objects; so only the default tenant is served then, under a key that
everybody knows.

A prefix is a chain: the name of a run of tokens is an HMAC over the name of the one before it and its own tokens, so it
stands for every token from the first on.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvcomm.errors import TierError
from kvcomm.files.reading import CONFIG_BYTES, read_bytes
from kvcomm.memory.fidelity import Fidelity
from kvcomm.tiers.space import DEFAULT_TENANT, RenditionName, TierSpace

ROOT = "kvcomm-1"
"""The first part of every name; of another layout it would be another one. What lies beside it is not ours."""

MIN_SECRET = 16
"""Bytes; shorter ones can be guessed."""

_NO_SECRET = b"kvcomm tier without a secret"


class ChainLink(NamedTuple):
    """One run of a prefix.

    Attributes:
        start: position of its first token.
        parent: hex; of the run before it, or of the chain's beginning.
        digest: hex; stands for all tokens up to its end.
    """

    start: int
    parent: str
    digest: str


class SpaceKeys:
    """Names of the objects of one space, and their seal."""

    def __init__(self, key: bytes, space: TierSpace) -> None:
        """`key`: of the space's tenant."""
        self.space = space
        self._key = _mac(
            key,
            "space",
            space.namespace,
            space.producer,
            space.dtype_name,
            str(space.vocab_size),
            *(f"{s.num_kv_heads},{s.key_dim},{s.value_dim}" for s in space.shapes),
        )
        self.root = f"{ROOT}/{self._hex('root')[:32]}"

    def chain(self, token_ids: Sequence[int], run_tokens: int) -> list[ChainLink]:
        """The whole runs of a prefix, in order; what is left at its end has no name."""
        ids = np.asarray(token_ids, dtype="<i4")
        links: list[ChainLink] = []
        parent = _mac(self._key, "chain", str(run_tokens))
        for start in range(0, len(ids) - run_tokens + 1, run_tokens):
            digest = hmac.digest(self._key, parent + ids[start : start + run_tokens].tobytes(), hashlib.sha256)
            links.append(ChainLink(start, parent.hex(), digest.hex()))
            parent = digest
        return links

    def prefix(self, link: ChainLink) -> str:
        """Key of one run of a prefix."""
        return f"{self.root}/prefix/{link.digest}"

    def renditions(self, digest: str) -> str:
        """Key of the folder of a segment's renditions."""
        return f"{self.root}/rendition/{self._hex('segment', digest)[:32]}/"

    def rendition(self, name: RenditionName, fidelity: Fidelity) -> str:
        """Key of one rendition."""
        where = self._hex("rendition", name.digest, name.signature, str(name.position), fidelity.value)
        return self.renditions(name.digest) + where

    def blobs(self, kind: str) -> str:
        """Key of the folder of all blobs of a kind."""
        return f"{self.root}/{kind}/"

    def blob(self, kind: str, name: str) -> str:
        """Key of the folder of a blob's versions."""
        return f"{self.blobs(kind)}{self._hex('blob', kind, name)[:32]}/"

    def seal(self, key: str, header_digest: str) -> str:
        """Hex; says that whoever wrote a header under a name has the tenant's key."""
        return self._hex("seal", key, header_digest)

    def _hex(self, *parts: str) -> str:
        return _mac(self._key, *parts).hex()


def tenant_key(secret: bytes | None, tenant: str) -> bytes | None:
    """The key of a tenant; None: there is no secret, and it is not the default tenant."""
    if secret is None:
        return _NO_SECRET if tenant == DEFAULT_TENANT else None
    return _mac(secret, "tenant", tenant)


def read_secret(file: Path) -> bytes:
    """The secret in a file, without white space around it: the same for all who are given that file.

    Raises:
        TierError: it cannot be read, or is too short.
    """
    try:
        found = read_bytes(file, max_bytes=CONFIG_BYTES).strip()
    except OSError as error:
        raise TierError(f"the tier's secret {file} cannot be read: {error.strerror or error}") from error
    if len(found) < MIN_SECRET:
        raise TierError(f"the tier's secret {file} has {len(found)} bytes, not {MIN_SECRET} or more: it can be guessed")
    return found


def require_secret(secret: bytes | None) -> bytes | None:
    """The secret itself.

    Raises:
        TierError: it is too short to be one.
    """
    if secret is not None and len(secret) < MIN_SECRET:
        raise TierError(f"a tier's secret has {MIN_SECRET} bytes or more, not {len(secret)}: others could guess it")
    return secret


def _mac(key: bytes, *parts: str) -> bytes:
    """HMAC-SHA256 over texts, each with its length before it."""
    encoded = [each.encode(errors="surrogatepass") for each in parts]
    message = b"".join(struct.pack("<Q", len(each)) + each for each in encoded)
    return hmac.digest(key, b"kvcomm tier 1\0" + message, hashlib.sha256)
