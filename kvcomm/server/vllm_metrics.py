"""A few metrics under the names that vLLM gives them, for routers that scrape them: llm-d's and AIBrix's.

The values mean what routers take them for. In vLLM blocks that are only cached count as free, since a new request takes
them; so they do here, and a full cache is no reason to send requests elsewhere. Blocks are those of the KV events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvcomm.engine.engine import Engine

ENGINE = "0"
"""Of the engines of one vLLM: there is one."""


class VllmMetrics(Collector):
    """What an engine does now, in vLLM's words."""

    def __init__(self, engine: Engine, num_waiting: Callable[[], int], *, model: str, block_size: int) -> None:
        """Make one.

        Args:
            num_waiting: requests that wait to be computed.
            model: what clients call it.
            block_size: in tokens.
        """
        self._engine = engine
        self._num_waiting = num_waiting
        self._labels = {"model_name": model, "engine": ENGINE}
        self._block_size = block_size

    def collect(self) -> Iterator[Metric]:
        """The present values."""
        stats = self._engine.cache.stats()
        usage = min(1.0, (stats.num_in_contexts + stats.num_in_requests) / stats.num_pages)
        usage_meaning = "KV that requests and contexts hold, of all there is room for; 1 is all."
        yield self._gauge("num_requests_running", "Requests that are computed.", self._engine.requests.num_running)
        yield self._gauge("num_requests_waiting", "Requests that wait to be computed.", self._num_waiting())
        yield self._gauge("kv_cache_usage_perc", usage_meaning, usage)
        yield self._gauge("gpu_cache_usage_perc", f"{usage_meaning} The older name.", usage)
        num_tokens = stats.num_pages * self._engine.config.page_size
        config = {
            "block_size": str(self._block_size),
            "num_gpu_blocks": str(num_tokens // self._block_size),
            "enable_prefix_caching": "True",
            "engine": ENGINE,
        }
        yield _gauge("cache_config_info", "How large the cache is, in its labels.", 1, config)

    def _gauge(self, name: str, meaning: str, value: float) -> Metric:
        return _gauge(name, meaning, value, self._labels)


def _gauge(name: str, meaning: str, value: float, labels: dict[str, str]) -> Metric:
    family = GaugeMetricFamily(f"vllm:{name}", meaning, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
