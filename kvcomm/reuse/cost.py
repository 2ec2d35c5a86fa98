"""What computing and moving take on this machine, so that reuse is refused where it would not pay.

A pass takes a fixed time, a time per row, and a time per row and position it attends to; moving takes a time per token.
The four are measured once per machine and model (in about 2 s) and kept in the user's cache folder. Only differences
between two plans are looked at, so a busy machine, on which everything takes longer, changes no decision.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvcomm.align.ops.contract import LayerStore, Rotate
from kvcomm.align.spans import place_of
from kvcomm.errors import PoolExhausted
from kvcomm.files.reading import CONFIG_BYTES, read_bytes
from kvcomm.files.writing import replacing
from kvcomm.memory.memory import Memory
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.compiled import processor
from kvcomm.model.runner import ModelRunner, Run

logger = logging.getLogger("kvcomm.engine")

TRIALS = ((16, 16), (16, 1024), (256, 256), (256, 1024))
"""(rows, end) of the passes that are timed."""

NUM_TRIES = 3
"""Of each; the fastest but the first one counts, since others were disturbed."""

ENOUGH_S = 2.0
"""Seconds after which no further try is begun: somebody waits for a first answer."""

ALIGN_FACTOR = 3.0
"""Bytes that correcting a token moves, against only rotating it."""

MARGIN = 0.95
"""Reuse has to be predicted to take at most this share of the exact time: predictions are not that exact."""


class CostModel(BaseModel):
    """Seconds: for a pass, for each of its rows, for each row and attended position, for each moved token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pass_s: float = Field(ge=0, allow_inf_nan=False)
    row_s: float = Field(ge=0, allow_inf_nan=False)
    pair_s: float = Field(ge=0, allow_inf_nan=False)
    move_s: float = Field(ge=0, allow_inf_nan=False)

    def compute_s(self, stretches: Sequence[tuple[int, int]]) -> float:
        """Predicted seconds of one pass over stretches `[start, end)` of one sequence."""
        num_rows = sum(end - start for start, end in stretches)
        num_pairs = sum((end - start) * (start + end) / 2 for start, end in stretches)
        return self.pass_s + num_rows * self.row_s + num_pairs * self.pair_s

    def plan_s(self, passes: Sequence[Sequence[tuple[int, int]]], num_moved: int) -> float:
        """Predicted seconds of several passes and of moving tokens before them."""
        return sum(self.compute_s(stretches) for stretches in passes) + num_moved * self.move_s


class ReuseCost:
    """The cost model of one engine, measured on first use."""

    def __init__(self, measure: Callable[[], CostModel]) -> None:
        self._measure = measure
        self._has_failed = False
        self.model: CostModel | None = None

    def prepare(self) -> None:
        """Measure, or read what was measured before; on the engine's thread, not under its lock.

        Where it fails nothing is ever worth moving, and nobody's request suffers.

        Raises:
            PoolExhausted: no room for a trial now; worth another try.
        """
        if self.model is not None or self._has_failed:
            return
        try:
            self.model = self._measure()
        except PoolExhausted:
            raise
        except Exception:
            self._has_failed = True
            logger.exception("what moving costs could not be measured: everything is computed")

    def is_worth_it(
        self, passes: Sequence[Sequence[tuple[int, int]]], num_moved: int, num_exact: int, num_tokens: int
    ) -> bool:
        """Whether moving and computing stretches, pass by pass, beats computing all behind the exact prefix."""
        if self.model is None:
            return False
        return self.model.plan_s(passes, num_moved) <= MARGIN * self.model.compute_s([(num_exact, num_tokens)])


def cached_cost(file: Path, measure: Callable[[], CostModel]) -> CostModel:
    """The model in `file`, or a fresh one, which is kept there if the folder can be written."""
    try:
        return CostModel.model_validate_json(read_bytes(file, max_bytes=CONFIG_BYTES))
    except (OSError, ValidationError):
        model = measure()
    try:
        with replacing(file) as temporary:
            temporary.write_text(model.model_dump_json())
    except OSError:
        pass  # measured again next time
    return model


def machine_label() -> str:
    """What timings depend on besides the model."""
    # The number at the end grows when times are taken or fitted in another way.
    cores = f"{os.cpu_count()}cpu-{torch.get_num_threads()}threads"
    return f"{processor()}-{cores}-{torch.__version__}-3"


def measure_cost(
    memory: Memory, runner: ModelRunner, layers: Sequence[LayerStore], rotate: Rotate, max_context: int
) -> CostModel:
    """Time a few passes and a move on scratch pages.

    Raises:
        PoolExhausted: the pool has no room for them.
    """
    trials = [(rows, min(end, max_context)) for rows, end in TRIALS]
    longest = max(end for _, end in trials)
    sequence = KVSequence(memory.pool, np.ones(2 * longest, dtype=np.int32))
    try:
        memory.make_writable(sequence, 0, 2 * longest)
        for stored in (*memory.pool.keys, *memory.pool.values):
            stored[memory.pool.slots(sequence.pages, 2 * longest)] = 0.0  # untouched memory would be too fast, or NaN
        timed = _fastest([_pass_of(runner, sequence, min(rows, end), end) for rows, end in trials])
        moved = min(256, longest)
        source = place_of(memory.pool, sequence.pages, 0, moved, position=0)
        target = place_of(memory.pool, sequence.pages, longest, moved, position=longest)
        (rotate_s,) = _fastest([lambda: rotate(layers, source, target)])
    finally:
        sequence.release()
    rows = [[1.0, min(n, end), min(n, end) * (end - (min(n, end) - 1) / 2)] for n, end in trials]
    pass_s, row_s, pair_s = _non_negative_fit(np.array(rows), np.array(timed))
    return CostModel(pass_s=pass_s, row_s=row_s, pair_s=pair_s, move_s=ALIGN_FACTOR * rotate_s / moved)


def _pass_of(runner: ModelRunner, sequence: KVSequence, num_rows: int, end: int) -> Callable[[], object]:
    run = Run(sequence.token_ids[end - num_rows : end], sequence.pages, end - num_rows)
    return lambda: runner.forward([run])


def _fastest(works: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of each work's fastest try, in rounds. The first one may compile, so it never counts."""
    started = time.perf_counter()
    for work in works:
        work()
    fastest = [_time_s(work) for work in works]
    for _ in range(NUM_TRIES - 2):
        if time.perf_counter() - started > ENOUGH_S:
            break
        fastest = [min(before, _time_s(work)) for before, work in zip(fastest, works, strict=True)]
    return fastest


def _time_s(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _non_negative_fit(rows: np.ndarray, timed: np.ndarray) -> tuple[float, float, float]:
    """Least squares with relative errors, in as many terms as leave none negative: pairs go first, rows stay."""
    for kept in ([0, 1, 2], [0, 1], [1]):
        solved, *_ = np.linalg.lstsq(rows[:, kept] / timed[:, None], np.ones(len(timed)), rcond=None)
        if (solved >= 0).all():
            break
    found = dict(zip(kept, np.maximum(solved, 0).tolist(), strict=True))
    return found.get(0, 0.0), found.get(1, 0.0), found.get(2, 0.0)
