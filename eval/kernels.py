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

from eval.command import note
from eval.figures import Figure, Report
from eval.workload import add_sizes, make_parser, parse, run, settings
from kvcomm import Engine
from kvcomm.lab.kernels import kv_bytes, made_neighbors, made_offsets, make_ops, pool_layers
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
    ops = make_ops("auto", engine.model.device)
    timed: dict[str, list[float]] = {"copy": [], "rotate": [], "align": []}
    with pool_layers(engine, 2, options.tokens) as (layers, (source, target)):
        offsets = made_offsets(layers, options.anchors)
        neighbors = made_neighbors(layers, options.tokens, options.k, options.anchors)
        block = torch.ones(COPY_BYTES // 4, device=layers[0].keys.device)
        other = torch.empty_like(block)
        for index in range(options.repeats + 1):
            note(f"round {index} of {options.repeats}")
            timed["copy"].append(_seconds(lambda: other.copy_(block)))
            timed["rotate"].append(_seconds(lambda: ops.rotate(layers, source, target)))
            timed["align"].append(_seconds(lambda: ops.align(layers, source, target, offsets, neighbors)))
    samples = {name: Samples(tuple(seconds[1:])) for name, seconds in timed.items()}  # the first one warms up
    moved = {
        "copy": 2 * COPY_BYTES,
        "rotate": options.tokens * kv_bytes(layers) * 2,
        "align": options.tokens * (2 * kv_bytes(layers) + options.k * offsets.num_bytes // options.anchors),
    }
    figures = _figures(samples, moved, options)
    return Report("kernels", figures, settings(engine, options), {name: list(s.values) for name, s in samples.items()})


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
