"""Exact KV that vLLM's kernels computed, in a tier that other workers read.

The producer stands in every name: KV of vLLM is found by vLLMs of the same version and kind. KV of kvcomm's kernels is
read as well where a comparison at start has shown that both agree; never the other way round from here.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from kvcomm.errors import SnapshotError, StoreFailed
from kvcomm.integrations.vllm.params import RequestParams
from kvcomm.integrations.vllm.preparation import KVLists
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.pool import LayerShape
from kvcomm.memory.snapshots import read_snapshot
from kvcomm.model.namespace import tenant_namespace
from kvcomm.tiers.tier import KV, Tier, TierMiss, TierSpace

logger = logging.getLogger("kvcomm.vllm")

ENGINE_PRODUCER = "kvcomm"
"""As which kvcomm's own engines write."""


def whole_shapes(shapes: Sequence[LayerShape], num_kv_heads: int) -> tuple[LayerShape, ...]:
    """What the whole model stores per layer, of what one worker does."""
    return tuple(shape._replace(num_kv_heads=num_kv_heads) for shape in shapes)


class TierShelf:
    """One worker's view of a tier. Safe to use from several threads."""

    def __init__(
        self,
        tier: Tier,
        space: TierSpace,
        *,
        also_from: Sequence[str] = (),
        token_s: Callable[[], float | None] = lambda: None,
        read_s: float = 5.0,
        writes: bool = True,
    ) -> None:
        """Make one.

        Args:
            space: of the default tenant, with vLLM as the producer.
            also_from: producers whose KV counts as exact beside vLLM's.
            token_s: seconds that computing a token takes; None: not known.
            read_s: seconds that a read may take at most.
            writes: False: another worker has copies of the same heads, and saves them.
        """
        self.tier = tier
        self._space = space
        self._producers = (space.producer, *also_from)
        self._token_s = token_s
        self._read_s = read_s
        self._writes = writes

    def find(self, token_ids: Sequence[int], params: RequestParams) -> KVLists | None:
        """KV of the longest prefix that is there, if getting it takes less time than computing it."""
        if not self.tier.serves(params.tenant):
            return None
        wanted = token_ids[:-1]  # the last token is always computed
        if params.snapshot is not None:
            return self._snapshot(wanted, params.snapshot, params)
        spaces = [self._of(params.tenant, producer) for producer in self._producers]
        lengths = [self.tier.prefix_length(space, wanted, deadline_s=self._deadline(len(wanted))) for space in spaces]
        num, space = max(zip(lengths, spaces, strict=True), key=lambda each: each[0])
        if num == 0 or not self._is_worth(space, num):
            return None
        read = self.tier.read_prefix(space, wanted, 0, num, deadline_s=self._deadline(num))
        if not read.runs:
            return None
        kv = read.joined()
        return kv.keys, kv.values

    def keep(self, token_ids: Sequence[int], kv: KVLists, start: int, params: RequestParams) -> None:
        """Queue KV of `token_ids[start:]` to be written; only whole runs are."""
        if not (self._writes and self.tier.serves(params.tenant)):
            return
        on_cpu = KV(*([each.to("cpu") for each in layers] for layers in kv))

        def load(first: int) -> KV:
            if first < start:
                raise StoreFailed(f"the tier has lost tokens before {start}; they are written when they are computed")
            return on_cpu.part(first - start, len(token_ids) // self.tier.run_tokens * self.tier.run_tokens - start)

        space = self._of(params.tenant, self._space.producer)
        self.tier.put_prefix_later(space, token_ids, load, num_bytes=on_cpu.num_bytes)

    def close(self) -> None:
        """Write what waits."""
        self.tier.close()

    def _snapshot(self, token_ids: Sequence[int], name: str, params: RequestParams) -> KVLists | None:
        """KV of what a prompt has in common with a snapshot, where its fidelity and its kernels allow that."""
        space = self._of(params.tenant, ENGINE_PRODUCER)
        content = self.tier.get_blob(space, "snapshot", name, deadline_s=self._read_s)
        if isinstance(content, TierMiss):
            logger.info("snapshot %s is not used: %s", name, content.value)
            return None
        try:
            with tempfile.TemporaryDirectory(prefix="kvcomm-") as folder:
                file = Path(folder) / "snapshot.safetensors"
                file.write_bytes(content)
                found = read_snapshot(
                    file,
                    namespace=tenant_namespace(space.namespace, params.tenant),
                    shapes=list(space.shapes),
                    dtype=space.dtype,
                    vocab_size=space.vocab_size,
                )
        except (SnapshotError, OSError) as error:
            logger.warning("snapshot %s is not used: %s", name, error)
            return None
        is_exact = found.header.fidelity is Fidelity.EXACT and ENGINE_PRODUCER in self._producers
        num = _num_common(token_ids, found.header.token_ids[: found.header.num_computed])
        if num == 0 or not (is_exact or params.may_be_approximate):
            return None
        return [key[:num] for key in found.keys], [value[:num] for value in found.values]

    def _of(self, tenant: str, producer: str) -> TierSpace:
        return replace(self._space, tenant=tenant, producer=producer)

    def _deadline(self, num_tokens: int) -> float:
        token_s = self._token_s()
        return self._read_s if token_s is None else min(self._read_s, num_tokens * token_s)

    def _is_worth(self, space: TierSpace, num_tokens: int) -> bool:
        token_s = self._token_s()
        return token_s is None or self.tier.is_worth(space.token_bytes * num_tokens, num_tokens * token_s)


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    differing = (at for at, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(differing, min(len(first), len(second)))
