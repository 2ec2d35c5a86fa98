"""Part `passes`: a model's prefill, decoding of 1, 8 and 32 rows, and prefix hits, beside transformers alone."""

from __future__ import annotations

from argparse import Namespace

from eval.gpu.records import Recorder
from eval.stock import Stock
from kvcomm import Engine
from kvcomm.lab.timings import (
    TakeTokens,
    measure_prefix_hit,
    prefilled,
    time_decode_step,
    time_request,
)

ROWS = (1, 8, 32)


def measure(engine: Engine, take: TakeTokens, options: Namespace, record: Recorder) -> None:
    """As often as there are repeats, or as time is left for."""
    stock = Stock(engine.model)
    _prefill(engine, stock, take, options, record)
    _hits(engine, take, options, record)
    for rows in ROWS:
        _decode(engine, take, rows, options, record)
    _decode_stock(stock, take, options, record)


def _prefill(engine: Engine, stock: Stock, take: TakeTokens, options: Namespace, record: Recorder) -> None:
    """In turns; the first pair warms up."""
    own_s: list[float] = []
    stock_s: list[float] = []
    for index in range(options.repeats + 1):
        if record.is_over:
            record.cut(f"round {index} of prefills")
            break
        prompt = take(options.prefill_tokens)
        engine.cache.clear()
        pair = time_request(engine, prompt)[0], stock.prefill_s(prompt, use_cache=True)
        if index:
            own_s.append(pair[0])
            stock_s.append(pair[1])
    if own_s:
        record.samples("prefill_s", own_s, "s")
        record.samples("prefill_tokens_per_s", [options.prefill_tokens / each for each in own_s], "tokens/s")
        record.samples("prefill_ratio", [a / b for a, b in zip(own_s, stock_s, strict=True)], "x", goal="<= 1.02")


def _hits(engine: Engine, take: TakeTokens, options: Namespace, record: Recorder) -> None:
    hits = []
    for index in range(options.repeats):
        if record.is_over:
            record.cut(f"pair {index + 1} of prefix hits")
            break
        num_prefix_tokens = options.context_tokens - options.tail_tokens
        hits.append(
            measure_prefix_hit(engine, take, num_prefix_tokens=num_prefix_tokens, num_tail_tokens=options.tail_tokens)
        )
    if hits:
        record.samples("hit_s", [hit.cached_s for hit in hits], "s")
        record.samples("hit_speedup", [hit.cold_s / hit.cached_s for hit in hits], "x")


def _decode(engine: Engine, take: TakeTokens, rows: int, options: Namespace, record: Recorder) -> None:
    if record.is_over:
        record.cut(f"decoding {rows} rows")
        return
    num_new = options.new_tokens
    step_s: list[float] = []
    with prefilled(
        engine, take, num_contexts=rows, num_tokens=options.decode_tokens, num_room_tokens=num_new
    ) as contexts:
        for index in range(options.repeats + 1):
            if record.is_over:
                record.cut(f"round {index} of decoding {rows} rows")
                break
            seconds = time_decode_step(engine, contexts, num_new_tokens=num_new)
            if index:
                step_s.append(seconds)
    if step_s:
        record.samples(f"decode_{rows}_step_s", step_s, "s")
        record.samples(f"decode_{rows}_tokens_per_s", [rows / each for each in step_s], "tokens/s")


def _decode_stock(stock: Stock, take: TakeTokens, options: Namespace, record: Recorder) -> None:
    if record.is_over:
        record.cut("decoding by transformers alone")
        return
    filled = stock.fill(take(options.decode_tokens))
    num_new = options.new_tokens
    step_s = []
    for index in range(options.repeats + 1):
        if record.is_over:
            record.cut(f"round {index} of decoding by transformers alone")
            break
        seconds = stock.continue_from(filled, num_new_tokens=num_new).decode_s / (num_new - 1)
        if index:
            step_s.append(seconds)
    if step_s:
        record.samples("decode_1_stock_step_s", step_s, "s")
