"""Which product serves how many rows of which weight: measured once for each machine and model, and remembered.

Processors differ: what is quickest on one maker's is not on another's, and it depends on cores and on the library's
version. So every product of `linear` that can serve a weight is timed on the model's own weights, for some numbers of
rows, and the table is kept in the cache folder. It takes a few seconds of one run. A file that is damaged, foreign or
cannot be written costs that time again, never an answer. Small models, whose weights stay in the processor's caches
anyway, take `FIXED`; `KVCOMM_PRODUCTS=fixed` makes all do so.
"""

from __future__ import annotations

import json
import logging
import os
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvcomm.errors import InvalidRequest
from kvcomm.files.reading import CONFIG_BYTES, BadContent, parse_json, read_bytes
from kvcomm.files.writing import replacing
from kvcomm.model import compiled
from kvcomm.model.cache_folder import cache_root
from kvcomm.model.linear import CANDIDATES, LOOPS, ROWS, Joined, TileMemory, can_compute, product

logger = logging.getLogger("kvcomm.model")

SCHEME = 2
"""Of the file; counts up when products or the way they are measured change."""

VARIABLE = "KVCOMM_PRODUCTS"

MIN_PROBED_BYTES = 64 << 20
"""Weights of a model from which measuring pays."""

MAX_READ_BYTES = 24 << 20
"""Weights of one shape that one measurement reads: more than a core's own caches hold."""

MAX_WORK = 1 << 31
"""Multiplications of one measurement: with many rows fewer weights are taken, and larger ones not at all."""

REPEATS = 3

MIN_GAIN = 0.15
"""Share of the time that another product must save to be taken in place of one that is preferred."""

HOPELESS = 2
"""A compiled loop that takes so many times as long as the quickest product does not catch up with more rows."""

FIXED = {
    torch.float32: ("outputs",) * 3 + ("blocks",) * 3 + ("onednn",) * 3,
    torch.bfloat16: ("tiles",) * 7 + ("torch",) * 2,
}
"""What serves where nothing was measured, by the numbers of `ROWS`."""

WeightShape = tuple[int, int]


@dataclass(frozen=True)
class ProductChoice:
    """Names of products.

    Attributes:
        table: a name for each number of `ROWS`; None: `FIXED`.
        origin: where the table comes from, for people: "fixed", "measured" or "remembered".
        seconds: CPU time that measuring took.
        memory: for the products of all layers that share this choice.
    """

    table: tuple[str, ...] | None = None
    origin: str = "fixed"
    seconds: float = 0.0
    memory: TileMemory = field(default_factory=TileMemory, repr=False, compare=False)

    def name(self, weight: Tensor, num_rows: int) -> str:
        """Name among `CANDIDATES` of the product for so many rows of a weight of a dtype."""
        at = min(bisect_left(ROWS, num_rows), len(ROWS) - 1)
        table = self.table or FIXED.get(weight.dtype)
        return table[at] if table is not None and can_compute(table[at], weight) else "torch"

    def joined(self, layers: Sequence[nn.Linear]) -> Joined:
        """These layers, which read the same rows and have one dtype, by what is chosen for their weights."""
        names = [[self.name(layer.weight, num_rows) for num_rows in ROWS] for layer in layers]
        return Joined(layers, names, self.memory)


def choose(layers: Sequence[nn.Linear], root: Path | None = None) -> ProductChoice:
    """What to compute these layers by; all on CPU and of one dtype among `CANDIDATES`.

    Args:
        root: the folder that tables are kept in; None: "products" in the cache folder.

    Raises:
        InvalidRequest: `KVCOMM_PRODUCTS` says something unknown.
    """
    wish = os.environ.get(VARIABLE, "")
    if wish not in ("", "fixed"):
        raise InvalidRequest(f"{VARIABLE} is {wish!r}; it can be 'fixed', or unset to let products be measured")
    weights = list({layer.weight.data_ptr(): layer.weight.detach() for layer in layers}.values())
    num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    if wish or num_bytes < MIN_PROBED_BYTES:
        return ProductChoice()
    key = _key(weights)
    path = (cache_root() / "products" if root is None else root) / f"{_digest(key)}.json"
    found = _read(path, key)
    if found is None:
        found = measure(weights)
        _write(path, key, found)
    return found


def measure(weights: Sequence[Tensor]) -> ProductChoice:
    """Time the products on weights of every shape; all of one dtype among `CANDIDATES`."""
    start = time.process_time()
    with torch.inference_mode(), compiled.threads():
        table = _table(weights)
    return ProductChoice(table, "measured", time.process_time() - start)


def _table(weights: Sequence[Tensor]) -> tuple[str, ...]:
    by_shape: dict[WeightShape, list[Tensor]] = {}
    for weight in weights:
        by_shape.setdefault((weight.shape[0], weight.shape[1]), []).append(weight)
    names = [name for name in CANDIDATES[weights[0].dtype] if all(can_compute(name, one) for one in weights)]
    table: list[str] = []
    for num_rows in ROWS:
        shapes = [shape for shape in by_shape if shape[0] * shape[1] * num_rows <= MAX_WORK] or [min(by_shape)]
        alike = [by_shape[shape] for shape in shapes]
        seconds = {name: sum(len(some) * _seconds(name, some, num_rows) for some in alike) for name in names}
        fastest = min(seconds.values())
        # What served fewer rows is preferred, so that noise does not make passes differ.
        ordered = sorted(names, key=lambda name: (name not in table[-1:], names.index(name)))
        table.append(next(name for name in ordered if seconds[name] * (1 - MIN_GAIN) <= fastest))
        names = [name for name in names if name not in LOOPS or seconds[name] <= HOPELESS * fastest]
    return tuple(table)


def _seconds(name: str, weights: Sequence[Tensor], num_rows: int) -> float:
    """CPU time of a product with one weight, the shortest that was seen: other processes only add to it."""
    num_out, num_in = weights[0].shape
    num_bytes = num_out * num_in * weights[0].element_size()
    some = weights[: max(1, min(MAX_READ_BYTES // num_bytes, MAX_WORK // (num_out * num_in * num_rows)))]
    rows = torch.randn(num_rows, num_in, dtype=torch.float32).to(weights[0].dtype)
    taken = []
    for _ in range(REPEATS):
        start = time.process_time()
        for weight in some:
            product(name, rows, weight)
        taken.append((time.process_time() - start) / len(some))
    return min(taken)


def _key(weights: Sequence[Tensor]) -> dict[str, Any]:
    """What a table depends on."""
    return {
        "scheme": SCHEME,
        "processor": compiled.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(weights[0].dtype).removeprefix("torch."),
        "shapes": sorted({(weight.shape[0], weight.shape[1]) for weight in weights}),
    }


def _digest(key: dict[str, Any]) -> str:
    return sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def _read(path: Path, key: dict[str, Any]) -> ProductChoice | None:
    """The table of a file, or None if there is none that can be used."""
    try:
        stored = parse_json(read_bytes(path, max_bytes=CONFIG_BYTES))
        table = tuple(stored["table"])
        is_ours = stored["key"] == json.loads(json.dumps(key)) and len(table) == len(ROWS)
    except (OSError, BadContent, TypeError, KeyError):
        return None
    allowed = CANDIDATES[getattr(torch, key["dtype"])]
    return ProductChoice(table, "remembered") if is_ours and all(name in allowed for name in table) else None


def _write(path: Path, key: dict[str, Any], choice: ProductChoice) -> None:
    """Keep a table, whole or not at all; whoever writes last wins."""
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"key": key, "rows": ROWS, "table": choice.table}))
    except OSError as error:
        logger.warning("which products are quickest is measured again in the next process: %s", error)
