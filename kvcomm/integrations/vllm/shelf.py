"""Exact KV that vLLM's kernels computed, in a tier that other workers and kvcomm's own engines read.

The producer stands in every name: KV of vLLM is found by vLLMs of the same version and kind. KV of kvcomm's kernels is
read as well where a comparison at start has shown that both agree; never the other way round from here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from kvcomm.integrations.vllm.params import RequestParams
from kvcomm.integrations.vllm.preparation import KVLists
from kvcomm.tiers.tier import KV, Tier, TierSpace

logger = logging.getLogger("kvcomm.vllm")

ENGINE_PRODUCER = "kvcomm"
"""As which kvcomm's own engines write."""


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
    ) -> None:
        """Args:
        space: of the default tenant, with vLLM as the producer.
        also_from: producers whose KV counts as exact beside vLLM's.
        token_s: seconds that computing a token takes; None: not known.
        read_s: seconds that a read may take at most.
        """
        self.tier = tier
        self._space = space
        self._producers = (space.producer, *also_from)
        self._token_s = token_s
        self._read_s = read_s

    def find(self, token_ids: Sequence[int], params: RequestParams) -> KVLists | None:
        """KV of the longest prefix that is there, if getting it takes less time than computing it."""
        if not self.tier.serves(params.tenant):
            return None
        wanted = token_ids[:-1]  # the last token is always computed
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
        if not self.tier.serves(params.tenant):
            return
        on_cpu = KV(*([each.to("cpu") for each in layers] for layers in kv))

        def load(first: int) -> KV:
            if first < start:
                raise ValueError(f"the tier has lost tokens before {start}")  # it is written when it is computed again
            return on_cpu.part(first - start, len(token_ids) // self.tier.run_tokens * self.tier.run_tokens - start)

        space = self._of(params.tenant, self._space.producer)
        self.tier.put_prefix_later(space, token_ids, load, num_bytes=on_cpu.num_bytes)

    def close(self) -> None:
        """Write what waits."""
        self.tier.close()

    def _of(self, tenant: str, producer: str) -> TierSpace:
        return replace(self._space, tenant=tenant, producer=producer)

    def _deadline(self, num_tokens: int) -> float:
        token_s = self._token_s()
        return self._read_s if token_s is None else min(self._read_s, num_tokens * token_s)

    def _is_worth(self, space: TierSpace, num_tokens: int) -> bool:
        token_s = self._token_s()
        return token_s is None or self.tier.is_worth(space.token_bytes * num_tokens, num_tokens * token_s)
