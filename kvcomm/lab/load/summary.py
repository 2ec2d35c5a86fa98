"""What a run adds up to, by the names that vLLM's and SGLang's benchmarks print.

TTFT is the time to the first piece of text, TPOT the time per output token behind it, ITL the time between pieces; a
piece may hold several tokens. Only requests that came to their end count, `failed` says how many did not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from kvcomm.figures import Figure
from kvcomm.lab.load.client import Sample


def summarise(samples: Sequence[Sample], duration_s: float) -> list[Figure]:
    """Figures of a run that took `duration_s`."""
    done = [sample for sample in samples if sample.error is None]
    inputs = sum(int(sample.usage.get("prompt_tokens", 0)) for sample in done)
    cached = sum(int(_cached(sample)) for sample in done)
    outputs = sum(sample.output_tokens for sample in done)
    return [
        Figure("duration", duration_s, "s"),
        Figure("completed", len(done), "requests"),
        Figure("failed", len(samples) - len(done), "requests"),
        Figure("total_input_tokens", inputs, "tokens"),
        Figure("total_cached_tokens", cached, "tokens"),
        Figure("total_output_tokens", outputs, "tokens"),
        Figure("request_throughput", len(done) / duration_s, "requests/s"),
        Figure("output_throughput", outputs / duration_s, "tokens/s"),
        Figure("total_token_throughput", (inputs + outputs) / duration_s, "tokens/s"),
        *_times("ttft", (sample.events_s[0] for sample in done if sample.events_s)),
        *_times("tpot", _per_token(done)),
        *_times("itl", (later - former for sample in done for former, later in pairwise(sample.events_s))),
        *_times("e2el", (sample.total_s for sample in done)),
    ]


def median_ms(name: str, seconds: Sequence[float]) -> Figure:
    """The middle one in milliseconds, and the quartiles."""
    low, middle, high = (1e3 * np.quantile(seconds, (0.25, 0.5, 0.75))).tolist()
    return Figure(name, middle, "ms", (low, high))


def _cached(sample: Sample) -> int:
    return (sample.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _per_token(samples: Iterable[Sample]) -> Iterator[float]:
    for sample in samples:
        if sample.output_tokens > 1 and sample.events_s:
            yield (sample.events_s[-1] - sample.events_s[0]) / (sample.output_tokens - 1)


def _times(name: str, seconds: Iterable[float]) -> list[Figure]:
    """Mean, median and 99th percentile in milliseconds; none of what was never seen."""
    values = list(seconds)
    if not values:
        return []
    return [
        Figure(f"mean_{name}_ms", 1e3 * float(np.mean(values)), "ms"),
        median_ms(f"median_{name}_ms", values),
        Figure(f"p99_{name}_ms", 1e3 * float(np.quantile(values, 0.99)), "ms"),
    ]
