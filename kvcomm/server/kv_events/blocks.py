"""Names of blocks, the same that vLLM gives them with `prefix_caching_hash_algo="sha256_cbor"`.

A block's name is the SHA-256 of the canonical CBOR of (name of the block before, its tokens, extra keys); events carry
its low 64 bits. What keeps tenants and adapters apart in vLLM are the extra keys: a salt in the first block, the name
and path of an adapter in all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

DEFAULT_SEED = "vllm-none-hash"
"""What stands before the first block, unless vLLM finds PYTHONHASHSEED in its environment."""

Keys = tuple[tuple[str, ...], ...]
"""Extra keys of one block, each with its kind before it, as they are hashed."""


class Owner(NamedTuple):
    """Whose blocks those of a namespace are: all that goes into their names besides the tokens.

    Attributes:
        salt: as vLLM's `cache_salt`; empty: none, whoever knows the tokens knows the names.
        adapter: name of an adapter, empty: the model alone.
        adapter_path: where it was loaded from.
    """

    salt: str = ""
    adapter: str = ""
    adapter_path: str = ""

    def keys(self, block_index: int) -> Keys:
        """Extra keys of the block with that index in its path."""
        adapter = (("lora", self.adapter, self.adapter_path),) if self.adapter else ()
        salt = (("cache_salt", self.salt),) if self.salt and not block_index else ()
        return adapter + salt


def root_hash(seed: str = DEFAULT_SEED) -> bytes:
    """What stands in the place of the block before the first one."""
    return _digest(seed)


def block_hash(parent: bytes, token_ids: Sequence[int], keys: Keys = ()) -> bytes:
    """The name of a block.

    Args:
        parent: of the block before; of the first block, the `root_hash`.
        token_ids: of the block, all of them.
        keys: its extra keys.
    """
    return _digest((parent, tuple(token_ids), keys or None))


def as_int(name: bytes) -> int:
    """The low 64 bits, as events carry them."""
    return int.from_bytes(name[-8:], "big")


def _digest(value: object) -> bytes:
    import cbor2

    return hashlib.sha256(cbor2.dumps(value, canonical=True)).digest()
