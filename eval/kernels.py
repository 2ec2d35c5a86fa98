"""How fast moved KV is written, against what this machine's memory allows.

    python -m eval.kernels [--tokens 2048] [--k 8] [--anchors 512] [--repeats N] [--json]

`align` and a plain copy of a large tensor take turns. Bytes moved per token: the source's keys and values read, the
target's written, and k neighbors' quantized rows read in every layer that has offsets.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence

import torch

from eval.figures import Figure, Report
from eval.workload import add_sizes, make_parser, note, parse, run, settings
from kvcomm import Engine
from kvcomm.align.offsets import OffsetRows, OffsetTable
from kvcomm.align.ops.choice import make_ops
from kvcomm.align.ops.contract import LayerStore, Neighbors, Place
from kvcomm.align.spans import layer_stores
from kvcomm.lab.timings import Samples, TakeTokens

COPY_BYTES = 256 * 2**20
GOALS = {"align_bandwidth": ">= 0.5"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = make_parser("kernels", "Bytes that align and rotate move per second, against a plain copy.")
    add_sizes(parser, tokens=2048, k=8, anchors=512)
    return run(parse(parser, arguments, repeats=15, quick_repeats=5), measure)


def measure(engine: Engine, take: TakeTokens, options: Namespace) -> Report:
    """All figures, on scratch pages of the engine's pool; no prompts are needed."""
    layers = layer_stores(engine.pool, engine.geometry)
    num_pages = -(-options.tokens // engine.config.page_size)
    with engine.lock:
        pages = engine.pool.allocate(2 * num_pages)
    try:
        slots = [engine.pool.slots(part, options.tokens) for part in (pages[:num_pages], pages[num_pages:])]
        source, target = Place(slots[0], 100), Place(slots[1], 900)
        for layer in layers:  # real memory: pages never written all lie in one place
            for stored in (layer.keys, layer.values):
                stored[source.slots] = stored[target.slots] = torch.randn_like(stored[target.slots])
        offsets = make_anchors(layers, options.anchors)
        neighbors = make_neighbors(layers, options.tokens, options.k, options.anchors)
        ops = make_ops("auto", engine.model.device)
        block = torch.ones(COPY_BYTES // 4, device=layers[0].keys.device)
        other = torch.empty_like(block)
        timed: dict[str, list[float]] = {"copy": [], "rotate": [], "align": []}
        for index in range(options.repeats + 1):
            note(f"round {index} of {options.repeats}")
            timed["copy"].append(_seconds(lambda: other.copy_(block)))
            timed["rotate"].append(_seconds(lambda: ops.rotate(layers, source, target)))
            timed["align"].append(_seconds(lambda: ops.align(layers, source, target, offsets, neighbors)))
    finally:
        with engine.lock:
            engine.pool.release(pages)
    samples = {name: Samples(tuple(seconds[1:])) for name, seconds in timed.items()}  # the first one warms up
    moved = {
        "copy": 2 * COPY_BYTES,
        "rotate": options.tokens * kv_bytes(layers) * 2,
        "align": options.tokens * (2 * kv_bytes(layers) + options.k * offsets.num_bytes // options.anchors),
    }
    figures = _figures(samples, moved, options)
    return Report("kernels", figures, settings(engine, options), {name: list(s.values) for name, s in samples.items()})


def kv_bytes(layers: Sequence[LayerStore]) -> int:
    """Keys and values of one token over all layers."""
    return sum(stored[0].nbytes for layer in layers for stored in (layer.keys, layer.values))


def make_anchors(layers: Sequence[LayerStore], count: int) -> OffsetTable:
    """Random offsets of so many anchor tokens, in all layers but the first."""

    def rows(stored: torch.Tensor) -> OffsetRows:
        return OffsetRows.quantize(torch.randn(count, *stored.shape[1:], device=stored.device))

    keys = [rows(layer.keys) for layer in layers[1:]]
    return OffsetTable((None, *keys), (None, *(rows(layer.values) for layer in layers[1:])))


def make_neighbors(layers: Sequence[LayerStore], num_tokens: int, k: int, num_anchors: int) -> Neighbors:
    """Random ones, weighted alike."""
    device = layers[0].keys.device
    indices = torch.randint(0, num_anchors, (1, num_tokens, k), device=device)
    weights = torch.full(indices.shape, 1 / k, device=device)
    return Neighbors(indices, weights, (0,) * len(layers))


def _figures(samples: dict[str, Samples], moved: dict[str, int], options: Namespace) -> list[Figure]:
    copied = Samples(tuple(moved["copy"] / seconds for seconds in samples["copy"].values))
    figures = [Figure("copy_bytes_per_s", copied.median, "bytes/s", copied.quartiles)]
    for name in ("rotate", "align"):
        shares = [
            moved[name] / seconds / rate for seconds, rate in zip(samples[name].values, copied.values, strict=True)
        ]
        share = Samples(tuple(shares))
        name_of_share = f"{name}_bandwidth"
        figures.append(Figure(name_of_share, share.median, "x", share.quartiles, GOALS.get(name_of_share, "")))
        figures.append(Figure(f"{name}_s", samples[name].median, "s", samples[name].quartiles))
        figures.append(Figure(f"{name}_bytes_per_token", moved[name] / options.tokens, "bytes"))
    return figures


def _seconds(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
