"""What Prometheus may ask: tokens by where they came from, times in seconds, why reuse failed, how full the pool is.

One registry per app. Counters here are sums over all tenants and carry no tenant's name, so only the operator may read
them. What the engine counts itself is read when somebody asks; what ends with a request is counted as it ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvcomm.engine.engine import Engine
from kvcomm.engine.results import Completion
from kvcomm.memory.ages import BOUNDS_S
from kvcomm.reuse.plan import Reason
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.server.endings import reasons_of
from kvcomm.server.errors import CLIENT_GONE
from kvcomm.server.logs import Ended
from kvcomm.server.tally import SECONDS
from kvcomm.tiers.tier import Tier, TierStats

if TYPE_CHECKING:
    from kvcomm.server.admission import AdmissionControl
    from kvcomm.server.workers import FairGate

REFUSALS = frozenset(
    {
        Reason.NO_SOURCE,
        Reason.IMMOVABLE,
        Reason.NO_ANCHORS,
        Reason.UNCALIBRATED,
        Reason.BOUND,
        Reason.BREAKER,
        Reason.OUT_OF_DISTRIBUTION,
        Reason.SOURCE_RISK,
        Reason.DISPLACED,
        Reason.COMES_BACK,
        Reason.COST,
        Reason.ESCALATED,
        Reason.NO_ROOM,
        Reason.FAILED,
    }
)
"""Reasons for computing text that could have been moved."""


class Metrics:
    """The metrics of one app. Safe to use from several threads."""

    def __init__(self, engine: Engine, admission: AdmissionControl, turns: FairGate) -> None:
        """`turns`: those for the engine."""
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine, admission, turns))
        self.registry.register(_TierCollector(engine.tiering.tier))
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens found there.")
        self._from_tier = self._counter("prompt_tokens_from_tier", "Of the exact ones, those from the shared tier.")
        self._read_along = self._counter(
            "prompt_tokens_read_along", "Of the computed ones, those computed before their prompt was complete."
        )
        self._by_source = self._counter("prompt_tokens_by_source", "Prompt tokens: exact, aligned, computed.", "source")
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        self._misses = self._counter("miss", "Prompt tokens computed, by reason.", "reason")
        self._decisions = self._counter(
            "anchor_decisions",
            "Requests that allowed approximation: refused by reason, accepted by the level of the pairs that decided.",
            "decision",
            "reason",
        )
        self._requests = self._counter("http_requests", "Requests answered.", "method", "route", "status")
        self._finished = self._counter(
            "finished_requests",
            "Answers by finish reason; requests without a whole answer: client_gone, refused, timed_out, failed.",
            "reason",
        )
        self._refused = self._counter("refused_requests", "Requests answered with an error, by its code.", "reason")
        self._queue = self._histogram("request_queue_time_seconds", "From submission to admission by the engine.")
        self._ttft = self._histogram("time_to_first_token_seconds", "From submission to the first token.")
        self._per_token = self._histogram("time_per_output_token_seconds", "Between tokens, mean of a request.")
        self._total = self._histogram("e2e_request_latency_seconds", "From submission to the end of the answer.")
        self._http = self._histogram(
            "http_request_duration_seconds", "From headers to the end of the response.", "route"
        )

    def completed(self, completion: Completion, policy: ReusePolicy) -> None:
        """Count an engine request that has ended well."""
        usage = completion.usage
        self._queries.inc(usage.prompt_tokens)
        self._hits.inc(usage.exact_tokens)
        sources = {"exact": usage.exact_tokens, "aligned": usage.aligned_tokens, "computed": usage.computed_tokens}
        for source, num_tokens in sources.items():
            self._by_source.labels(source).inc(num_tokens)
        self._from_tier.inc(usage.tier_tokens)
        self._read_along.inc(usage.read_along_tokens)
        self._generated.inc(usage.generated_tokens)
        for reason, num_tokens in usage.reasons.items():
            self._misses.labels(reason).inc(num_tokens)
        self._queue.observe(usage.queue_s)
        self._ttft.observe(usage.ttft_s)
        self._total.observe(usage.total_s)
        if usage.generated_tokens > 1:
            self._per_token.observe((usage.total_s - usage.ttft_s) / (usage.generated_tokens - 1))
        if not policy.is_exact:
            self._decided(completion)

    def ended(self, ended: Ended) -> None:
        """Count a request of whatever kind; the method only where it belongs to an operation: clients invent some."""
        route, error = ended.notes.route, ended.notes.error
        for reason in reasons_of(ended):
            self._finished.labels(reason).inc()
        if error is not None and error.status_code != CLIENT_GONE:
            self._refused.labels(error.code).inc()
        self._requests.labels(ended.method if route != "other" else "other", route, str(ended.status)).inc()
        self._http.labels(route).observe(ended.duration_s)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _decided(self, completion: Completion) -> None:
        refusals = sorted(REFUSALS & completion.usage.reasons.keys())
        bound = completion.usage.bound
        if completion.usage.approximation is not None and bound is not None and bound.level is not None:
            self._decisions.labels("accepted", bound.level.value).inc()
        for reason in refusals:
            self._decisions.labels("refused", reason).inc()

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"kvcomm:{name}", meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, *labels: str) -> Histogram:
        return Histogram(f"kvcomm:{name}", meaning, labels, buckets=SECONDS, registry=self.registry)


class _TierCollector(Collector):
    """What the shared tier has counted, with the kind of its store as a label; without a tier there are no samples."""

    def __init__(self, tier: Tier | None) -> None:
        self._tier = tier

    def collect(self) -> Iterator[Metric]:
        """The present values."""
        stats = None if self._tier is None else self._tier.stats()
        for name, meaning, total in _tier_totals(stats):
            family = CounterMetricFamily(f"kvcomm:{name}", meaning, labels=["tier"])
            yield _labelled(family, stats, {(): total})
        yield self._by_reason("tier_misses", "Reads that gave nothing.", stats, stats.misses if stats else {})
        yield self._by_reason("tier_dropped", "What was not written.", stats, stats.dropped if stats else {})
        queue = GaugeMetricFamily("kvcomm:tier_queue", "What waits to be written.", labels=["tier"])
        yield _labelled(queue, stats, {(): stats.queued if stats else 0})
        meaning = "Whether the latest read or write failed."
        failing = GaugeMetricFamily("kvcomm:tier_is_failing", meaning, labels=["tier"])
        yield _labelled(failing, stats, {(): int(stats.is_failing) if stats else 0})

    def _by_reason(self, name: str, meaning: str, stats: TierStats | None, counts: Mapping[str, int]) -> Metric:
        family = CounterMetricFamily(f"kvcomm:{name}", meaning, labels=["tier", "reason"])
        return _labelled(family, stats, {(reason,): number for reason, number in counts.items()})


def _tier_totals(stats: TierStats | None) -> list[tuple[str, str, float]]:
    """Name, meaning and value of what a tier counts."""
    return [
        ("tier_gets", "Objects read from the tier and right.", stats.hits if stats else 0),
        ("tier_get_bytes", "Their bytes.", stats.read_bytes if stats else 0),
        ("tier_get_seconds", "Their seconds.", stats.read_s if stats else 0),
        ("tier_puts", "Objects written to the tier.", stats.puts if stats else 0),
        ("tier_put_bytes", "Their bytes.", stats.written_bytes if stats else 0),
        ("tier_put_seconds", "Their seconds.", stats.write_s if stats else 0),
        ("tier_failed_puts", "Objects that could not be written.", stats.unwritten if stats else 0),
    ]


def _labelled(
    family: CounterMetricFamily | GaugeMetricFamily,
    stats: TierStats | None,
    values: Mapping[tuple[str, ...], float],
) -> Metric:
    """A family with a sample for each label behind the tier's kind; without a tier it has none."""
    if stats is not None:
        for labels, value in values.items():
            family.add_metric([stats.kind, *labels], value)
    return family


class _EngineCollector(Collector):
    """What the engine and the admission know themselves."""

    def __init__(self, engine: Engine, admission: AdmissionControl, turns: FairGate) -> None:
        self._engine = engine
        self._admission = admission
        self._turns = turns

    def collect(self) -> Iterator[Metric]:
        """The present values."""
        engine = self._engine
        stats = engine.cache.stats()
        gauges = {
            "kv_cache_usage_ratio": ("Pages in use.", 1 - stats.num_free / stats.num_pages),
            "kv_cache_cached_pages": ("Pages that cached prefixes refer to.", stats.num_cached),
            "requests_running": ("Engine requests that are computed.", engine.requests.num_running),
            "requests_waiting": ("Engine requests that wait to be computed.", self._num_waiting),
            "requests_in_flight": ("Engine requests that hold a place.", self._admission.num_in_flight),
        }
        for name, (meaning, value) in gauges.items():
            yield GaugeMetricFamily(f"kvcomm:{name}", meaning, value=value)
        yield CounterMetricFamily(
            "kvcomm:audit_violations",
            "Audits in which moved KV broke the bound.",
            value=engine.reuse.num_violations,
        )
        yield self._evicted()
        yield from self._ages()

    @property
    def _num_waiting(self) -> int:
        return self._engine.requests.num_waiting + self._turns.num_waiting

    def _ages(self) -> Iterator[Metric]:
        ages = self._engine.cache.ages
        histograms = {
            "kv_page_lifetime_seconds": ("Cached pages dropped, by the time since they came.", ages.lifetime),
            "kv_page_idle_before_drop_seconds": ("Cached pages dropped, by the time since their use.", ages.idle),
            "kv_page_reuse_gap_seconds": ("Cached pages found, by the time since the use before.", ages.reuse_gap),
        }
        with self._engine.cache.unchanged():
            for name, (meaning, histogram) in histograms.items():
                totals = zip((*map(str, BOUNDS_S), "+Inf"), accumulate(histogram.counts), strict=True)
                yield HistogramMetricFamily(f"kvcomm:{name}", meaning, list(totals), histogram.sum_s)

    def _evicted(self) -> Metric:
        engine = self._engine
        usage = engine.cache.total_usage()
        family = CounterMetricFamily("kvcomm:evicted_tokens", "Cached tokens dropped, by reason.", labels=["reason"])
        family.add_metric(["evicted"], usage.evicted_tokens)
        family.add_metric(["expired"], usage.expired_tokens)
        family.add_metric(["quota"], usage.quota_tokens)
        return family
