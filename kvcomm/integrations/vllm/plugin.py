"""What vLLM loads by itself where kvcomm is installed beside it (entry point `vllm.general_plugins`).

It names the connector, so that `--kv-transfer-config '{"kv_connector": "KVCommConnector", "kv_role": "kv_both"}'` is
enough, and lets whatever worker the platform has show the connector its model. Where no such connector is configured
nothing changes, and a vLLM that kvcomm does not know is left as it is.
"""

from __future__ import annotations

import logging
from functools import wraps
from typing import Any

from kvcomm.errors import UnsupportedModel

logger = logging.getLogger("kvcomm.vllm")

CONNECTOR, MODULE = "KVCommConnector", "kvcomm.integrations.vllm.connector"


def register() -> None:
    """Called by vLLM in each of its processes, perhaps more than once."""
    from kvcomm.integrations.vllm import adapter, needed

    try:
        needed.require_known()
        adapter.name_connector(CONNECTOR, MODULE)
        _show_models(adapter)
    except UnsupportedModel as error:
        logger.warning("kvcomm stays out: %s", error)


def _show_models(adapter: Any) -> None:
    worker = adapter.base_worker_class()
    initialize = worker.initialize_from_config
    if hasattr(initialize, "__wrapped__") and getattr(initialize, "shows_kvcomm", False):
        return

    @wraps(initialize)
    def initialize_from_config(self: Any, kv_cache_config: Any) -> None:
        initialize(self, kv_cache_config)
        adapter.attach_to(self, kv_cache_config)

    initialize_from_config.shows_kvcomm = True  # type: ignore[attr-defined]
    worker.initialize_from_config = initialize_from_config
