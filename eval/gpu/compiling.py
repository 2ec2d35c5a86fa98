"""Part `graphs`: what compiling a model's MLPs and replaying them as a CUDA graph would take and save.

kvcomm neither compiles layers for a GPU nor records graphs of decode steps yet. These are the figures to decide it by:
all MLPs of the model, one behind the other, for the rows of a decode step; as they are, by `torch.compile`, and as one
CUDA graph, with the seconds of compiling and of recording.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn

from eval.gpu.kernels import ROWS, synchronize, timed
from eval.gpu.records import Recorder
from kvcomm import Engine
from kvcomm.lab.kernels import described
from kvcomm.lab.timings import TakeTokens

Forward = Callable[[Tensor], Tensor]


def measure(engine: Engine, take: TakeTokens, options: Namespace, record: Recorder) -> None:
    """By rows; each way for itself, so that one that fails leaves the others."""
    device = engine.model.device
    if device.type != "cuda":
        record.skipped(f"compiling and graphs are measured on a CUDA device, this is {device.type}")
        return
    blocks = [module for name, module in engine.model.named_modules() if name.endswith(".mlp")]
    if not blocks:
        record.skipped(f"{type(engine.model).__name__} has no modules called mlp")
        return
    forward = nn.Sequential(*blocks)
    width = engine.model.config.get_text_config().hidden_size
    for rows in ROWS:
        states = torch.randn(rows, width, dtype=engine.model.dtype, device=device)
        for way, make in (("eager", _eager), ("compiled", _compiled), ("graph", _graph)):
            name = f"mlps_{rows}_{way}"
            if record.is_over:
                record.cut(name)
                return
            try:
                _one(name, make, forward, states, options, record)
            except Exception as error:  # a compiler's or a driver's too
                record.failed(f"{name}: {described(error)}")


def _one(
    name: str,
    make: Callable[[Forward, Tensor], Callable[[], object]],
    forward: Forward,
    states: Tensor,
    options: Namespace,
    record: Recorder,
) -> None:
    with torch.inference_mode():
        start = time.perf_counter()
        run = make(forward, states)
        run()
        synchronize(options.device)
        record.figure(f"{name}_first_s", time.perf_counter() - start, "s")
        record.samples(f"{name}_s", timed(run, options).values, "s")


def _eager(forward: Forward, states: Tensor) -> Callable[[], object]:
    return lambda: forward(states)


def _compiled(forward: Forward, states: Tensor) -> Callable[[], object]:
    compiled = torch.compile(forward, dynamic=False)
    return lambda: compiled(states)


def _graph(forward: Forward, states: Tensor) -> Callable[[], object]:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what happens once in a process must not be recorded
        forward(states)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward(states)
    return graph.replay
