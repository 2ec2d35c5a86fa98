"""What a fork costs, and what it is good for: branches of one parent, and contexts restored from a snapshot.

    python -m eval.fork [--model smollm2-135m] [--repeats N] [--json]

Branches are compared with stock batched `generate` in three ways. `branch_speedup`: both from the parent's tokens,
stock as its users call it, with one copy of the prompt a row. `branch_speedup_expanded`: stock computes the parent once
and repeats its cache. `branch_speedup_decode`: only the seconds from the start of decoding behind a computed parent to
the last token. Stock and engine take turns; all decode greedily, so all rows of all of them have the same tokens.
"""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eval.command import note
from eval.figures import Figure, Report
from eval.stock import Stock
from eval.workload import add_sizes, make_parser, parse, run, settings
from kvcomm import Engine
from kvcomm.lab.timings import (
    BranchCost,
    ForkCost,
    RestoreCost,
    Samples,
    TakeTokens,
    measure_branches,
    measure_forks,
    measure_restore,
)


class BranchPair(NamedTuple):
    """The same branches by both: stock from copies of the prompt, stock from a repeated cache, the engine."""

    stock_s: float
    stock_expanded_s: float
    stock_decode_s: float
    engine: BranchCost
    num_same_tokens: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = make_parser("fork", "Cost of a fork, speed of branches, restoring a snapshot.")
    add_sizes(parser, fork_tokens=8192, forks=500, parent_tokens=2048, branches=8, new_tokens=32, restore_tokens=1024)
    return run(parse(parser, arguments, repeats=3, quick_repeats=1), measure)


def measure(engine: Engine, take: TakeTokens, options: Namespace) -> Report:
    """All figures of an engine."""
    forks = _forks(engine, take, options)
    restores = _restores(engine, take, options)
    branches = _branches(engine, take, options)
    figures = [*_fork_figures(forks), *_branch_figures(branches, options), *_restore_figures(restores)]
    samples = {
        "fork_s": forks.fork_s.values,
        "branch_stock_s": [pair.stock_s for pair in branches],
        "branch_stock_expanded_s": [pair.stock_expanded_s for pair in branches],
        "branch_stock_decode_s": [pair.stock_decode_s for pair in branches],
        "branch_engine_s": [pair.engine.total_s for pair in branches],
        "branch_engine_decode_s": [pair.engine.decode_s for pair in branches],
        "recompute_s": [cost.recompute_s for cost in restores],
        "restore_s": [cost.restore_s for cost in restores],
    }
    return Report("fork", figures, settings(engine, options, stock_attention="sdpa"), samples)


def _forks(engine: Engine, take: TakeTokens, options: Namespace) -> ForkCost:
    note(f"computing a context of {options.fork_tokens} tokens and forking it {options.forks} times")
    with engine.context(take(options.fork_tokens)) as context:
        return measure_forks(engine, context, num_forks=options.forks)


def _restores(engine: Engine, take: TakeTokens, options: Namespace) -> list[RestoreCost]:
    costs = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(options.repeats):
            note(f"restoring {options.restore_tokens} tokens: pair {index + 1} of {options.repeats}")
            costs.append(measure_restore(engine, take(options.restore_tokens), Path(folder)))
    return costs


def _branches(engine: Engine, take: TakeTokens, options: Namespace) -> list[BranchPair]:
    stock = Stock(engine.model)
    pairs = []
    for index in range(options.repeats):
        note(f"{options.branches} branches of {options.parent_tokens} tokens: pair {index + 1} of {options.repeats}")
        pairs.append(_branch_pair(engine, stock, take(options.parent_tokens), options))
    return pairs


def _branch_pair(engine: Engine, stock: Stock, parent: list[int], options: Namespace) -> BranchPair:
    num_new = options.new_tokens
    whole = stock.generate(parent, num_rows=options.branches, num_new_tokens=num_new)
    cost = measure_branches(engine, parent, num_branches=options.branches, num_new_tokens=num_new)
    start = time.perf_counter()
    filled = stock.fill(parent, num_rows=options.branches)
    fill_s = time.perf_counter() - start
    expanded = stock.continue_from(filled, num_new_tokens=num_new)
    num_same = sum(
        own == other
        for answer, row in zip(cost.answers, whole.token_ids, strict=True)
        for own, other in zip(answer, row, strict=True)
    )
    return BranchPair(whole.total_s, fill_s + expanded.total_s, expanded.decode_s, cost, num_same)


def _fork_figures(forks: ForkCost) -> list[Figure]:
    fork_ms = forks.fork_s.scaled(1e3)
    return [
        Figure("fork_ms", fork_ms.median, "ms", fork_ms.quartiles, "<= 1"),
        Figure("fork_bytes", forks.bytes_copied, "bytes", None, "0"),
    ]


def _branch_figures(pairs: Sequence[BranchPair], options: Namespace) -> list[Figure]:
    engine_s = Samples(tuple(pair.engine.total_s for pair in pairs))
    decode_s = Samples(tuple(pair.engine.decode_s for pair in pairs))
    whole = Samples(tuple(pair.stock_s for pair in pairs)).per(engine_s)
    expanded = Samples(tuple(pair.stock_expanded_s for pair in pairs)).per(engine_s)
    decode = Samples(tuple(pair.stock_decode_s for pair in pairs)).per(decode_s)
    num_tokens = len(pairs) * options.branches * options.new_tokens
    cost = pairs[0].engine
    return [
        Figure("branch_speedup", whole.median, "x", whole.quartiles, ">= 2"),
        Figure("branch_speedup_expanded", expanded.median, "x", expanded.quartiles),
        Figure("branch_speedup_decode", decode.median, "x", decode.quartiles),
        Figure("branch_pool_bytes", cost.pool_bytes, "bytes", None, f"<= {cost.expected_bytes:,}"),
        Figure("branch_same_tokens", sum(pair.num_same_tokens for pair in pairs) / num_tokens, "share"),
        Figure("branch_engine_s", engine_s.median, "s", engine_s.quartiles),
    ]


def _restore_figures(costs: Sequence[RestoreCost]) -> list[Figure]:
    restore_s = Samples(tuple(cost.restore_s for cost in costs))
    speedup = Samples(tuple(cost.recompute_s for cost in costs)).per(restore_s)
    return [
        Figure("restore_speedup", speedup.median, "x", speedup.quartiles, ">= 20"),
        Figure("restore_s", restore_s.median, "s", restore_s.quartiles),
        Figure("snapshot_bytes", costs[0].file_bytes, "bytes"),
    ]


if __name__ == "__main__":
    sys.exit(main())
