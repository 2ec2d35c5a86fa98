"""Replay a request trace through the radix tree: hit rate, cost per token, and eviction beside the optimum.

    python -m eval.trace --trace FILE.jsonl.gz [--json] [--limit N] [--capacities 10,25,50]

Every block of the trace becomes real tokens, every request a match, an allocation (evicting if need be) and
an insert in the real tree and page pool, at the time that the trace gives; the pool has no layers, so only
bookkeeping is measured. Figures:

- hit_rate: blocks found by `match`, of all blocks of all prompts; nothing is ever evicted.
- ns_per_token: time inside `match` and `insert` per prompt token at page size 16 (`ns_per_token_page_N`: at the
  trace's own block size); median and quartiles over chunks of consecutive requests.
- lru_N, return_N: hit rate of each eviction policy with pages for N % of the trace's distinct blocks; the running
  prompt needs its pages, too. These passes give a block, and a page, 4 tokens: which blocks fit is the same.
- belady_N: the best that any cache of that size could do, knowing the future: see `eval.optimum`.
- gap_closed_N: the share of the way from LRU to that optimum that the default policy goes.
- ns_per_token_evicting: as ns_per_token, with pages for 10 % of the distinct blocks, `evict` included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eval.command import add_outputs, finish, note, positive
from eval.figures import Figure, Report
from eval.optimum import most_hits, next_uses, trie_paths
from kvcomm.lab.cache import DEFAULT_ORDER, ORDERS, BareCache, CachedPrompt
from kvcomm.lab.load.trace_file import Trace, TraceRequest, block_tokens, read_trace

PAGE_SIZE = 16
SMALL_BLOCK_SIZE = 4
CLEVER = "return"
"""The policy that is held against LRU, and timed where pages run out."""
NUM_CHUNKS = 20
MAX_NS_PER_TOKEN = 12
TIMED_PERCENT = 10
MIN_GAP_CLOSED = 0.4
KNOWN_HIT_RATES = {  # SHA-256 of a published trace -> per cent of its blocks that are prefix hits
    "f44195697c46b9cb97a5fc5f52756969104d6f7174e4c3a16484f7d3c46391a5": 36.6,
    "0390bf4a1bf1237423f021cd449ef0bff1e2d34008cb2ac4c0d85891065c4c34": 96.3,
}


class Pass(NamedTuple):
    """One replay of a whole trace."""

    hit_blocks: int
    num_pages: int  # held by the tree at the end
    seconds: npt.NDArray[np.float64]  # [num_requests], inside match, evict and insert
    num_tokens: npt.NDArray[np.int64]  # [num_requests]


def replay(trace: Trace, *, page_size: int, num_pages: int, eviction: str = DEFAULT_ORDER) -> Pass:
    """Serve all requests of `trace` in order, each at its own time."""
    cache = BareCache(num_pages=num_pages, page_size=page_size, eviction=eviction)
    served = [_serve(cache, request, trace.block_size) for request in trace.requests]
    sizes = [request.blocks.size * trace.block_size for request in trace.requests]
    return Pass(
        sum(each.num_found // trace.block_size for each in served),
        cache.num_held,
        np.array([each.seconds for each in served]),
        np.array(sizes, dtype=np.int64),
    )


def _serve(cache: BareCache, request: TraceRequest, block_size: int) -> CachedPrompt:
    cache.now_s = request.at_s
    return cache.serve(str(request.session), block_tokens(request.blocks, block_size))


def measure(trace: Trace, capacities: Sequence[int]) -> Report:
    """All figures of `trace`; `capacities` in per cent of its distinct blocks."""
    paths, num_distinct = trie_paths(trace.requests)
    figures: list[Figure] = []
    samples: dict[str, list[float]] = {}
    note(f"{len(trace.requests)} requests, {trace.num_blocks} blocks, {num_distinct} of them distinct")
    for page_size, name in ((PAGE_SIZE, "ns_per_token"), (trace.block_size, f"ns_per_token_page_{trace.block_size}")):
        note(f"unbounded, page size {page_size}")
        unbounded = replay(trace, page_size=page_size, num_pages=_enough_pages(trace, num_distinct, page_size))
        samples[name] = list(_ns_per_token(unbounded))
        figures.append(_cost(name, samples[name]))
    figures.insert(0, _hit_rate(trace, unbounded.hit_blocks))
    note(f"{TIMED_PERCENT} %, page size {PAGE_SIZE}")
    samples["ns_per_token_evicting"] = list(_ns_per_token(_timed_evicting(trace, num_distinct)))
    figures.append(_cost("ns_per_token_evicting", samples["ns_per_token_evicting"]))
    uses, small = next_uses(paths, num_distinct), replace(trace, block_size=SMALL_BLOCK_SIZE)
    for percent in capacities:
        capacity = max(1, round(num_distinct * percent / 100))
        note(f"{percent} %: {capacity} blocks")
        hits = {
            policy: replay(small, page_size=SMALL_BLOCK_SIZE, num_pages=capacity, eviction=policy).hit_blocks
            for policy in sorted(ORDERS)
        }
        best = most_hits(uses, capacity)
        figures += [Figure(f"{policy}_{percent}", _per_cent(found, trace), "%") for policy, found in hits.items()]
        figures.append(Figure(f"belady_{percent}", _per_cent(best, trace), "%"))
        figures.append(_gap_closed(percent, hits, best))
    config = {
        "format": trace.format,
        "sha256": trace.sha256,
        "page_size": PAGE_SIZE,
        "block_size": trace.block_size,
        "num_sessions": trace.num_sessions,
        "num_requests": len(trace.requests),
        "num_blocks": trace.num_blocks,
        "num_distinct_blocks": num_distinct,
        "capacities_percent": list(capacities),
    }
    return Report("trace", figures, config, samples)


def _enough_pages(trace: Trace, num_distinct: int, page_size: int) -> int:
    """Pages for all distinct blocks, a partial page at every branch, and the prompt that is being served."""
    per_block = -(-trace.block_size // page_size)
    longest = max(request.blocks.size for request in trace.requests)
    return (num_distinct + longest) * per_block + len(trace.requests) + 1


def _timed_evicting(trace: Trace, num_distinct: int) -> Pass:
    num_blocks = max(1, round(num_distinct * TIMED_PERCENT / 100))
    num_pages = num_blocks * -(-trace.block_size // PAGE_SIZE)
    return replay(trace, page_size=PAGE_SIZE, num_pages=num_pages, eviction=CLEVER)


def _gap_closed(percent: int, hits: Mapping[str, int], best: int) -> Figure:
    """Of the hits that the optimum has and LRU has not, the share that `return` has; 1 if there are none."""
    gap = best - hits["lru"]
    goal = f">= {MIN_GAP_CLOSED}" if percent == TIMED_PERCENT else ""
    return Figure(f"gap_closed_{percent}", (hits[CLEVER] - hits["lru"]) / gap if gap else 1.0, "", None, goal)


def _hit_rate(trace: Trace, hit_blocks: int) -> Figure:
    known = KNOWN_HIT_RATES.get(trace.sha256)
    return Figure("hit_rate", _per_cent(hit_blocks, trace), "%", None, f"{known}" if known else "")


def _per_cent(blocks: int, trace: Trace) -> float:
    return 100 * blocks / max(trace.num_blocks, 1)


def _ns_per_token(done: Pass) -> Iterator[float]:
    """One figure per chunk of consecutive requests that have any token."""
    chunks = min(NUM_CHUNKS, done.seconds.size)
    for seconds, tokens in zip(
        np.array_split(done.seconds, chunks), np.array_split(done.num_tokens, chunks), strict=True
    ):
        if tokens.sum():
            yield float(seconds.sum() / tokens.sum() * 1e9)


def _cost(name: str, samples: Sequence[float]) -> Figure:
    first, median, third = np.percentile(samples, (25, 50, 75)).tolist()
    goal = f"<= {MAX_NS_PER_TOKEN}" if name == "ns_per_token" else ""
    return Figure(name, median, "ns", (first, third), goal)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m eval.trace", description=__doc__.partition("\n")[0])
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE", help="a mooncake or agentic .jsonl[.gz]")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N lines of the file")
    parser.add_argument("--capacities", type=_percentages, default=(10, 25, 50), metavar="N,N", help="[10,25,50]")
    add_outputs(parser, "trace")
    options = parser.parse_args(arguments)

    def measured() -> Report:
        report = measure(read_trace(options.trace, limit=options.limit), options.capacities)
        return replace(report, config={"trace": options.trace.name, "limit": options.limit, **report.config})

    return finish(measured, options)


def _percentages(text: str) -> tuple[int, ...]:
    values = tuple(int(part) for part in text.split(","))
    if not all(1 <= value <= 100 for value in values):
        raise ValueError(f"{text} has a percentage outside [1, 100]")
    return values


if __name__ == "__main__":
    sys.exit(main())
