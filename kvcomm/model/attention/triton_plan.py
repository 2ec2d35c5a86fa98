"""What the Triton kernels compute, planned on the host once per pass.

A tile is a block of query rows of one run together with the range of keys that these rows can see, so keys
outside the causal range and outside the window are skipped by construction. Row r of a run is token r //
group_size and query head r % group_size of its key head. A run of one token with many keys is split into
parts, each a tile of its own, whose partial results are merged afterwards; how it is split depends on that
run alone, never on its neighbours in the batch. Pure numpy: this module knows neither torch nor triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcomm.model.attention.contract import IntArray, RunTable

NARROW_ROWS = 16
"""Rows of a tile for short runs: the least that a matrix unit takes."""

SPLIT_KEYS = 1024
"""Keys that one program reads alone before a run of one token is split."""

MAX_PARTS = 32
"""Most parts of one run; beyond SPLIT_KEYS * MAX_PARTS keys the parts grow instead."""

TILE_FIELDS = (
    "query_token",  # first token of the run in the query
    "out_token",  # first token of the run in the output, or the part where the tile is one of several
    "first_row",  # of this tile within the run
    "num_rows",  # of the whole run
    "run_start",  # position of the run's first token
    "keys_begin",  # first position that the tile reads
    "keys_end",  # one past the last
    "table_begin",  # of the run's pages in the concatenated page table
)
SPLIT_FIELDS = ("out_token", "first_part", "num_parts")

Int64Array = npt.NDArray[np.int64]


class RunArrays(NamedTuple):
    """The runs of a pass, column by column, all [num_runs] int64 except the last two."""

    starts: Int64Array
    ends: Int64Array
    first_tokens: Int64Array  # of each run among the concatenated tokens
    table_begins: Int64Array  # of each run in page_table
    page_table: IntArray  # [num_table_pages], only the pages that cover [0, end)
    slots: Int64Array  # [num_tokens], where the new keys and values go


class AttentionPlan(NamedTuple):
    """Tiles [num_tiles, 8] by kind, and how to merge the parts of the split ones; int32, any may be empty."""

    wide: IntArray
    narrow: IntArray
    split: IntArray
    merges: IntArray  # [num_split_runs, 3]
    num_parts: int


def flatten_runs(runs: Sequence[RunTable], page_size: int, num_slots: int) -> RunArrays:
    """Lay the runs out column by column.

    Raises:
        ValueError: There is no run, a run is empty or longer than its table, or a page lies outside the pool.
    """
    if not runs:
        raise ValueError("a pass needs at least one run")
    tables = [_checked_pages(run, page_size, num_slots) for run in runs]
    starts = np.array([run.start for run in runs], dtype=np.int64)
    ends = np.array([run.end for run in runs], dtype=np.int64)
    slots = [_slots(table, run.start, run.end, page_size) for table, run in zip(tables, runs, strict=True)]
    return RunArrays(
        starts=starts,
        ends=ends,
        first_tokens=_offsets(ends - starts),
        table_begins=_offsets(np.array([len(table) for table in tables], dtype=np.int64)),
        page_table=np.concatenate(tables),
        slots=np.concatenate(slots),
    )


def plan_attention(runs: RunArrays, *, group_size: int, sliding_window: int | None, wide_rows: int) -> AttentionPlan:
    """Cut the runs into tiles of `wide_rows` or NARROW_ROWS rows.

    Args:
        runs: The runs of the pass.
        group_size: Query heads per key head.
        sliding_window: Positions that a query sees, itself included; None for all.
        wide_rows: Rows of a tile for runs that do not fit NARROW_ROWS.
    """
    num_tokens = runs.ends - runs.starts
    is_single = num_tokens == 1
    num_seen = runs.ends if sliding_window is None else np.minimum(runs.ends, sliding_window)
    is_split = is_single & (num_seen > SPLIT_KEYS)
    is_wide = ~is_single & (num_tokens * group_size > NARROW_ROWS)
    window = sliding_window if sliding_window is not None else int(runs.ends.max())
    split, merges = _split(
        _tiles(runs, is_split, group_size, NARROW_ROWS, window),
        runs.first_tokens[is_split],
        num_seen[is_split],
    )
    return AttentionPlan(
        wide=_tiles(runs, is_wide, group_size, wide_rows, window).astype(np.int32),
        narrow=_tiles(runs, ~is_wide & ~is_split, group_size, NARROW_ROWS, window).astype(np.int32),
        split=split.astype(np.int32),
        merges=merges.astype(np.int32),
        num_parts=int(merges[:, 2].sum()),
    )


def _tiles(
    runs: RunArrays, selected: npt.NDArray[np.bool_], group_size: int, block_rows: int, window: int
) -> Int64Array:
    """Tiles of the selected runs, [num_tiles, 8] in the order of TILE_FIELDS."""
    ids = np.flatnonzero(selected)
    num_rows = (runs.ends - runs.starts)[ids] * group_size
    counts = -(-num_rows // block_rows)
    run = np.repeat(ids, counts)
    rows = np.repeat(num_rows, counts)
    first_row = _positions_within(counts) * block_rows
    last_row = np.minimum(first_row + block_rows, rows) - 1
    start = runs.starts[run]
    return np.stack(
        [
            runs.first_tokens[run],
            runs.first_tokens[run],
            first_row,
            rows,
            start,
            np.maximum(0, start + first_row // group_size + 1 - window),
            start + last_row // group_size + 1,
            runs.table_begins[run],
        ],
        axis=1,
    )


def _split(tiles: Int64Array, out_tokens: Int64Array, num_seen: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Cut the tiles of runs of one token along the keys; the tiles of a run all see the same keys."""
    tiles_per_run = len(tiles) // max(1, len(out_tokens))
    part_keys = np.maximum(SPLIT_KEYS, -(-num_seen // MAX_PARTS))
    num_parts = -(-num_seen // part_keys)
    first_parts = _offsets(num_parts)
    counts = np.repeat(num_parts, tiles_per_run)
    part = _positions_within(counts)
    keys = np.repeat(np.repeat(part_keys, tiles_per_run), counts)
    parts = np.repeat(tiles, counts, axis=0)
    out_token, begin, end = (TILE_FIELDS.index(name) for name in ("out_token", "keys_begin", "keys_end"))
    parts[:, out_token] = np.repeat(np.repeat(first_parts, tiles_per_run), counts) + part
    parts[:, begin] += part * keys
    parts[:, end] = np.minimum(parts[:, end], parts[:, begin] + keys)
    return parts, np.stack([out_tokens, first_parts, num_parts], axis=1)


def _checked_pages(run: RunTable, page_size: int, num_slots: int) -> IntArray:
    """The pages that cover [0, end), after checking the run."""
    if not 0 <= run.start < run.end <= len(run.pages) * page_size:
        raise ValueError(
            f"run [{run.start}, {run.end}) is empty or does not fit its {len(run.pages)} pages of {page_size} slots"
        )
    pages = np.asarray(run.pages[: -(-run.end // page_size)], dtype=np.int32)
    if pages.min() < 0 or (int(pages.max()) + 1) * page_size > num_slots:
        raise ValueError(
            f"run [{run.start}, {run.end}) has pages {pages.min()} to {pages.max()}; "
            f"the pool has pages 0 to {num_slots // page_size - 1}"
        )
    return pages


def _slots(pages: IntArray, start: int, end: int, page_size: int) -> Int64Array:
    positions = np.arange(start, end, dtype=np.int64)
    return pages[positions // page_size].astype(np.int64) * page_size + positions % page_size


def _offsets(counts: Int64Array) -> Int64Array:
    """Where each of the concatenated pieces begins."""
    return np.cumsum(counts) - counts


def _positions_within(counts: Int64Array) -> Int64Array:
    """0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1, ..."""
    return np.arange(counts.sum(), dtype=np.int64) - np.repeat(_offsets(counts), counts)
