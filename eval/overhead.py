"""What the engine costs and gains on one model, against transformers alone: prefill, decode, a cached prefix.

    python -m eval.overhead [--model smollm2-135m] [--repeats N] [--json]

Stock and engine take turns in one warm process, each going first every other time, so that whatever else the machine
does meets both; every ratio is the median over these pairs. The engine is timed as its callers see it, whole requests
through its queue. Its cache is cleared where tokens must be unseen, which also lets it write pages it has written
before, as it would in use.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from eval.command import note
from eval.figures import Figure, Report
from eval.stock import Stock
from eval.workload import add_sizes, make_parser, parse, run, settings
from kvcomm import Engine
from kvcomm.lab.timings import (
    Samples,
    TakeTokens,
    measure_prefix_hit,
    prefilled,
    time_decode_step,
    time_request,
)

GOALS = {"prefill_ratio": "<= 1.02", "decode_speedup_1": ">= 1.3", "decode_speedup_8": ">= 4", "hit_speedup": ">= 12"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = make_parser("overhead", "Engine against stock transformers: prefill, decode, a cached prefix.")
    add_sizes(parser, prefill_tokens=2048, context_tokens=1024, tail_tokens=32, new_tokens=33, streams=8)
    return run(parse(parser, arguments, repeats=9, quick_repeats=3), measure)


def measure(engine: Engine, take: TakeTokens, options: Namespace) -> Report:
    """All figures of an engine."""
    stock = Stock(engine.model)
    use_cache = _faster_use_cache(stock, take(options.prefill_tokens))
    samples = {
        **_prefill(engine, stock, take, options, use_cache=use_cache),
        **_decode(engine, stock, take, options),
        **_hits(engine, take, options),
    }
    config = settings(engine, options, stock_prefill_use_cache=use_cache, stock_attention="sdpa")
    values = {name: list(measured.values) for name, measured in samples.items()}
    return Report("overhead", _figures(samples, options), config, values)


def _faster_use_cache(stock: Stock, prompt: Sequence[int]) -> bool:
    """Which of its two ways to compute a prompt is faster for the stock model: that one is compared with."""
    note("stock forward: with or without a cache?")
    fastest = {True: float("inf"), False: float("inf")}
    for _ in range(3):  # the first time warms up
        fastest = {
            use_cache: min(seconds, stock.prefill_s(prompt, use_cache=use_cache))
            for use_cache, seconds in fastest.items()
        }
    return fastest[True] < fastest[False]


def _prefill(
    engine: Engine, stock: Stock, take: TakeTokens, options: Namespace, *, use_cache: bool
) -> dict[str, Samples]:
    stock_s, engine_s = [], []
    for index in range(options.repeats):
        note(f"prefill of {options.prefill_tokens} tokens: pair {index + 1} of {options.repeats}")
        prompt = take(options.prefill_tokens)
        engine.cache.clear()
        if index % 2:
            engine_s.append(time_request(engine, prompt)[0])
        stock_s.append(stock.prefill_s(prompt, use_cache=use_cache))
        if not index % 2:
            engine_s.append(time_request(engine, prompt)[0])
    return {"prefill_stock_s": Samples(tuple(stock_s)), "prefill_engine_s": Samples(tuple(engine_s))}


def _decode(engine: Engine, stock: Stock, take: TakeTokens, options: Namespace) -> dict[str, Samples]:
    """Seconds per token: stock with one stream, the engine with one and with many."""
    note(f"prefilling {options.streams} contexts of {options.context_tokens} tokens")
    stock_s, one_s, many_s = [], [], []
    num_new = options.new_tokens
    filled = stock.fill(take(options.context_tokens))
    with prefilled(
        engine,
        take,
        num_contexts=options.streams,
        num_tokens=options.context_tokens,
        num_room_tokens=num_new,
    ) as contexts:
        for index in range(options.repeats):
            note(f"decode of {num_new - 1} tokens: pair {index + 1} of {options.repeats}")
            if index % 2:
                one_s.append(time_decode_step(engine, contexts[:1], num_new_tokens=num_new))
            stock_s.append(stock.continue_from(filled, num_new_tokens=num_new).decode_s / (num_new - 1))
            if not index % 2:
                one_s.append(time_decode_step(engine, contexts[:1], num_new_tokens=num_new))
            many_s.append(time_decode_step(engine, contexts, num_new_tokens=num_new) / len(contexts))
    return {
        "decode_stock_s": Samples(tuple(stock_s)),
        "decode_engine_1_s": Samples(tuple(one_s)),
        f"decode_engine_{options.streams}_s": Samples(tuple(many_s)),
    }


def _hits(engine: Engine, take: TakeTokens, options: Namespace) -> dict[str, Samples]:
    hits = []
    for index in range(options.repeats):
        note(f"prompt of {options.context_tokens + options.tail_tokens} tokens: pair {index + 1} of {options.repeats}")
        hits.append(
            measure_prefix_hit(
                engine, take, num_prefix_tokens=options.context_tokens, num_tail_tokens=options.tail_tokens
            )
        )
    return {
        "ttft_cold_s": Samples(tuple(hit.cold_s for hit in hits)),
        "ttft_cached_s": Samples(tuple(hit.cached_s for hit in hits)),
    }


def _figures(samples: dict[str, Samples], options: Namespace) -> list[Figure]:
    many = f"decode_engine_{options.streams}_s"
    ratios = {
        "prefill_ratio": samples["prefill_engine_s"].per(samples["prefill_stock_s"]),
        "decode_speedup_1": samples["decode_stock_s"].per(samples["decode_engine_1_s"]),
        f"decode_speedup_{options.streams}": samples["decode_stock_s"].per(samples[many]),
        "hit_speedup": samples["ttft_cold_s"].per(samples["ttft_cached_s"]),
    }
    rates = {
        "prefill_stock_tokens_per_s": samples["prefill_stock_s"].rate(options.prefill_tokens),
        "prefill_engine_tokens_per_s": samples["prefill_engine_s"].rate(options.prefill_tokens),
        "decode_stock_tokens_per_s": samples["decode_stock_s"].rate(1),
        "decode_engine_1_tokens_per_s": samples["decode_engine_1_s"].rate(1),
        f"decode_engine_{options.streams}_tokens_per_s": samples[many].rate(1),
    }
    seconds = {name: samples[name] for name in ("ttft_cold_s", "ttft_cached_s")}
    return [
        *(_figure(name, measured, "x") for name, measured in ratios.items()),
        *(_figure(name, measured, "tokens/s") for name, measured in rates.items()),
        *(_figure(name, measured, "s") for name, measured in seconds.items()),
    ]


def _figure(name: str, measured: Samples, unit: str) -> Figure:
    return Figure(name, measured.median, unit, measured.quartiles, GOALS.get(name, ""))


if __name__ == "__main__":
    sys.exit(main())
