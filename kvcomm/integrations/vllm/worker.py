"""`--worker-cls kvcomm.integrations.vllm.worker.KVCommWorker`: the platform's worker, which shows kvcomm its model."""

from __future__ import annotations

from typing import Any

from kvcomm.integrations.vllm import adapter

_Worker = adapter.worker_class()


class KVCommWorker(_Worker):  # type: ignore[misc, valid-type, unused-ignore]
    """Like its base in everything."""

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Pages are there: kvcomm's connector may look at them."""
        super().initialize_from_config(kv_cache_config)
        adapter.attach_to(self, kv_cache_config)
