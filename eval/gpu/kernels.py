"""Part `kernels`: every kernel against the equation and against a plain copy of a large tensor.

Attention: decoding rows behind long contexts, a short run behind one (a prefix hit), and a prefill, by the Triton
kernels and by torch's back end, over several layers in turn, so that what one layer read is not still in a cache.
Moving: rotate and align by the Triton kernel and by the plain operations. Bytes are what must be read and written at
least. Errors are the largest difference from the equation in float64 (attention) or from the plain operations (moving).
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eval.gpu.records import Recorder
from kvcomm.errors import InvalidRequest
from kvcomm.lab.kernels import (
    AttentionBackend,
    AttentionStep,
    FlashInferBackend,
    LayerStore,
    Ops,
    Place,
    RunTable,
    TorchBackend,
    TritonBackend,
    described,
    kv_bytes,
    made_layers,
    made_neighbors,
    made_offsets,
    make_ops,
    paged_attention_reference,
    untested_triton_ops,
)
from kvcomm.lab.timings import Samples

PAGE_SIZE = 16
ROWS = (1, 8, 32)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NUM_NEIGHBORS, NUM_ANCHORS = 8, 512


class Case(NamedTuple):
    """Runs of a pass as [start, end), each of a sequence of its own."""

    name: str
    spans: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        """Computed."""
        return sum(end - start for start, end in self.spans)

    @property
    def num_pairs(self) -> float:
        """Of a query and a key that it sees."""
        return sum((end - start) * (start + end + 1) / 2 for start, end in self.spans)


class Storage(NamedTuple):
    """Keys and values of some layers, and a page table for every run of a case."""

    keys: list[Tensor]
    values: list[Tensor]
    runs: list[RunTable]

    @classmethod
    def of(cls, case: Case, options: Namespace, dtype: torch.dtype) -> Storage:
        """Random, over permuted pages."""
        counts = [-(-end // PAGE_SIZE) for _, end in case.spans]
        pages = np.random.default_rng(0).permutation(sum(counts)).astype(np.int32)
        tables = np.split(pages, np.cumsum(counts)[:-1])
        shape = (len(pages) * PAGE_SIZE, options.key_heads, options.head_dim)
        keys, values = (
            [torch.randn(shape, dtype=dtype, device=options.device) for _ in range(options.layers)] for _ in range(2)
        )
        runs = [RunTable(table, start, end) for table, (start, end) in zip(tables, case.spans, strict=True)]
        return cls(keys, values, runs)


def measure(options: Namespace, record: Recorder) -> None:
    """Half precision first: it is what models run in."""
    rate = copy_rate(options)
    record.samples("copy_bytes_per_s", rate.values, "bytes/s")
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if is_interpreted:
        record.skipped("times of Triton kernels: here they are interpreted, which says nothing of their speed")
    backends = _backends(options, record)
    for dtype_name, dtype in DTYPES.items():
        rates = rate.median, None if is_interpreted else rate.median
        for name, work in _works(options, record, backends, rates, dtype_name, dtype):
            if record.is_over:
                record.cut(name)
                return
            try:
                work()
            except InvalidRequest as error:  # a dtype or a device that it does not serve
                record.skipped(f"{name}: {error}")
            except Exception as error:  # a compiler's or a driver's too: the other kernels may do
                record.failed(f"{name}: {described(error)}")


def copy_rate(options: Namespace) -> Samples:
    """Bytes that a copy reads and writes per second."""
    block = torch.ones(options.copy_mb * 2**18, device=options.device)
    other = torch.empty_like(block)
    seconds = timed(lambda: other.copy_(block), options)
    return Samples(tuple(2 * block.nbytes / each for each in seconds.values))


def timed(work: Callable[[], object], options: Namespace) -> Samples:
    """Seconds of one call, in windows between synchronisations; twice is for warming up."""
    calls = 1 if options.device == "cpu" else 10
    found = []
    for index in range(options.repeats + 1):
        synchronize(options.device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(options.device)
        if index:
            found.append((time.perf_counter() - start) / calls)
    return Samples(tuple(found))


def synchronize(device: str) -> None:
    """Wait for all that was launched."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def cases(options: Namespace) -> list[Case]:
    """What attention is measured on."""
    context, prefill = options.context_tokens, options.prefill_tokens
    return [
        *(Case(f"decode_{rows}", ((context - 1, context),) * rows) for rows in ROWS),
        Case("hit", ((context - options.tail_tokens, context),)),
        Case("prefill", ((0, prefill),)),
    ]


Work = Callable[[], None]


def _works(
    options: Namespace,
    record: Recorder,
    backends: Sequence[AttentionBackend],
    rates: tuple[float, float | None],
    dtype_name: str,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Work]]:
    """Every measurement of a dtype, by name; `rates`: of a copy, and the same for Triton, or None: it is not timed."""
    for case in cases(options):
        for backend in backends:
            name = f"{case.name}_{dtype_name}_{backend.name}"
            rate = rates[backend.name == "triton"]
            yield name, _attention(name, case, backend, options, record, rate, dtype)
    for ops_name in ("triton", "reference"):
        for what in ("rotate", "align"):
            name = f"{what}_{dtype_name}_{ops_name}"
            yield name, _moving(name, what, ops_name, options, record, rates[ops_name == "triton"], dtype)


def _backends(options: Namespace, record: Recorder) -> list[AttentionBackend]:
    found: list[AttentionBackend] = []
    makers: list[Callable[[], AttentionBackend]] = [TritonBackend, FlashInferBackend]
    for make in makers if torch.device(options.device).type == "cuda" else makers[:1]:
        try:
            found.append(make())
        except InvalidRequest as error:  # not installed
            record.skipped(str(error))
    return [*found, TorchBackend()]


def _attention(
    name: str,
    case: Case,
    backend: AttentionBackend,
    options: Namespace,
    record: Recorder,
    rate: float | None,
    dtype: torch.dtype,
) -> Work:
    def work() -> None:
        storage = Storage.of(case, options, dtype)
        shape = (1, case.num_tokens, options.query_heads, options.head_dim)
        query = torch.randn(shape, dtype=dtype, device=options.device).transpose(1, 2)
        key, value = (torch.randn_like(query[:, : options.key_heads]) for _ in range(2))
        scale = options.head_dim**-0.5
        step = backend.prepare(storage.runs, storage.keys, storage.values, PAGE_SIZE)

        def layer(layer_id: int) -> Tensor:
            return step(layer_id, query, key, value, scale=scale, sliding_window=None)

        out = layer(0)
        truth, _ = paged_attention_reference(
            query.double(), storage.keys[0].double(), storage.values[0].double(), storage.runs, PAGE_SIZE, scale, None
        )
        record.figure(f"{name}_error", float((out.double() - truth).abs().max()), "")
        if rate is None:
            return
        seconds = timed(lambda: [layer(layer_id) for layer_id in range(options.layers)], options)
        seconds = seconds.scaled(1 / options.layers)
        record.samples(f"{name}_s", seconds.values, "s")
        if case.name == "prefill":
            flops = 4 * case.num_pairs * options.query_heads * options.head_dim
            record.samples(f"{name}_flops_per_s", [flops / each for each in seconds.values], "flops/s")
        else:
            read = sum(end for _, end in case.spans) * 2 * storage.keys[0][0].nbytes + 2 * query.nbytes
            record.samples(f"{name}_bandwidth", [read / each / rate for each in seconds.values], "x")
        if isinstance(backend, TritonBackend) and case.name != "hit":
            _write(name, step, key, value, options, record, rate)

    return work


def _write(
    name: str, step: AttentionStep, key: Tensor, value: Tensor, options: Namespace, record: Recorder, rate: float
) -> None:
    """The kernel that only writes new keys and values, which every layer's call begins with."""
    write = step.write  # type: ignore[attr-defined]  # the Triton step's own
    seconds = timed(lambda: [write(layer_id, key, value) for layer_id in range(options.layers)], options)
    moved = 2 * (key.nbytes + value.nbytes) * options.layers
    record.samples(f"write_{name}_bandwidth", [moved / each / rate for each in seconds.values], "x")


def _moving(
    name: str, what: str, ops_name: str, options: Namespace, record: Recorder, rate: float | None, dtype: torch.dtype
) -> Work:
    def work() -> None:
        num_tokens, size = options.prefill_tokens, (options.key_heads, options.head_dim)
        layers = made_layers(options.layers, 2 * num_tokens, *size, dtype=dtype, device=options.device)
        source, target = Place(slice(0, num_tokens), 100), Place(slice(num_tokens, 2 * num_tokens), 900)
        offsets = made_offsets(layers, NUM_ANCHORS)
        neighbors = made_neighbors(layers, num_tokens, NUM_NEIGHBORS, NUM_ANCHORS)

        def move(ops: Ops) -> None:
            if what == "rotate":
                ops.rotate(layers, source, target)
            else:
                ops.align(layers, source, target, offsets, neighbors)

        ops = _ops(ops_name, options)
        move(ops)
        if ops_name != "reference":
            mine = [_at(layers, target)[i].clone() for i in range(2)]
            move(_ops("reference", options))
            both = zip(mine, _at(layers, target), strict=True)
            record.figure(f"{name}_error", max(float((a.float() - b.float()).abs().max()) for a, b in both), "")
        if rate is None:
            return
        moved = num_tokens * 2 * kv_bytes(layers)
        if what == "align":
            moved += num_tokens * NUM_NEIGHBORS * offsets.num_bytes // NUM_ANCHORS
        seconds = timed(lambda: move(ops), options)
        record.samples(f"{name}_s", seconds.values, "s")
        record.samples(f"{name}_bandwidth", [moved / each / rate for each in seconds.values], "x")

    return work


def _ops(name: str, options: Namespace) -> Ops:
    return untested_triton_ops() if name == "triton" else make_ops(name, options.device)


def _at(layers: Sequence[LayerStore], place: Place) -> tuple[Tensor, Tensor]:
    """Keys and values of the last layer, which has offsets."""
    return layers[-1].keys[place.slots], layers[-1].values[place.slots]
