"""The plan against the definition: which keys each query row sees, and who computes it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.model.attention import triton_plan
from kvcomm.model.attention.contract import RunTable
from kvcomm.model.attention.triton_plan import (
    NARROW_ROWS,
    SPLIT_FIELDS,
    SPLIT_KEYS,
    TILE_FIELDS,
    AttentionPlan,
    flatten_runs,
    plan_attention,
)

WIDE_ROWS = 32


def tables(spans: list[tuple[int, int]], page_size: int) -> list[RunTable]:
    """Runs with pages of their own, numbered from the highest down."""
    counts = [-(-end // page_size) for _, end in spans]
    ids = np.arange(sum(counts), dtype=np.int32)[::-1]
    pages = np.split(ids, np.cumsum(counts)[:-1])
    return [RunTable(own, start, end) for own, (start, end) in zip(pages, spans, strict=True)]


def rows_of(plan: AttentionPlan) -> list[tuple[int, int, bool, range]]:
    """(out token or part, row, whether a part, keys) for every row that a tile stores."""
    found = []
    blocks = [(plan.wide, WIDE_ROWS, False), (plan.narrow, NARROW_ROWS, False), (plan.split, NARROW_ROWS, True)]
    for tiles, block_rows, is_part in blocks:
        for fields in tiles.tolist():
            tile = dict(zip(TILE_FIELDS, fields, strict=True))
            last_row = min(tile["first_row"] + block_rows, tile["num_rows"])
            keys = range(tile["keys_begin"], tile["keys_end"])
            found += [(tile["out_token"], row, is_part, keys) for row in range(tile["first_row"], last_row)]
    return found


spans = st.lists(
    st.tuples(st.integers(0, 60), st.sampled_from([1, 1, 2, 5, 40])).map(lambda pair: (pair[0], sum(pair))),
    min_size=1,
    max_size=6,
)


@given(spans, st.sampled_from([1, 3, 4, 20]), st.sampled_from([None, 1, 7, 200]), st.sampled_from([1, 4, 16]))
def test_every_row_gets_exactly_the_keys_it_sees(
    run_spans: list[tuple[int, int]], group_size: int, window: int | None, page_size: int
) -> None:
    runs = tables(run_spans, page_size)
    num_slots = page_size * sum(len(run.pages) for run in runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_plan, "SPLIT_KEYS", 10)
        patch.setattr(triton_plan, "MAX_PARTS", 4)
        plan = plan_attention(
            flatten_runs(runs, page_size, num_slots),
            group_size=group_size,
            sliding_window=window,
            wide_rows=WIDE_ROWS,
        )
    computed: dict[tuple[int, int], list[range]] = {}  # by first token of the run and row
    merges = [dict(zip(SPLIT_FIELDS, fields, strict=True)) for fields in plan.merges.tolist()]
    token_of_part = {
        part: merge["out_token"]
        for merge in merges
        for part in range(merge["first_part"], merge["first_part"] + merge["num_parts"])
    }
    assert sorted(token_of_part) == list(range(plan.num_parts))
    for out_token, row, is_part, keys in rows_of(plan):
        token = token_of_part[out_token] if is_part else out_token
        computed.setdefault((token, row), []).append(keys)
    first_token = 0
    for start, end in run_spans:
        for row in range((end - start) * group_size):
            position = start + row // group_size
            first = 0 if window is None else max(0, position - window + 1)
            read = [key for part in computed.pop((first_token, row)) for key in part]
            assert len(read) == len(set(read)), "a key is read twice"
            seen = [key for key in read if first <= key <= position]
            assert sorted(seen) == list(range(first, position + 1))
            assert max(read) < end
        first_token += end - start
    assert not computed, "tiles compute rows that no run has"


@given(spans, st.sampled_from([1, 3]), st.sampled_from([None, 7]))
def test_no_tile_reads_keys_that_none_of_its_rows_sees(
    run_spans: list[tuple[int, int]], group_size: int, window: int | None
) -> None:
    runs = tables(run_spans, 4)
    arrays = flatten_runs(runs, 4, 4 * sum(len(run.pages) for run in runs))
    plan = plan_attention(arrays, group_size=group_size, sliding_window=window, wide_rows=WIDE_ROWS)
    for tiles, block_rows in ((plan.wide, WIDE_ROWS), (plan.narrow, NARROW_ROWS)):
        for fields in tiles.tolist():
            tile = dict(zip(TILE_FIELDS, fields, strict=True))
            first = tile["run_start"] + tile["first_row"] // group_size
            last_row = min(tile["first_row"] + block_rows, tile["num_rows"]) - 1
            assert tile["keys_end"] == tile["run_start"] + last_row // group_size + 1
            assert tile["keys_begin"] == (0 if window is None else max(0, first - window + 1))


@pytest.mark.parametrize(
    ("num_keys", "num_parts"), [(SPLIT_KEYS, 0), (SPLIT_KEYS + 1, 2), (SPLIT_KEYS * 32, 32), (SPLIT_KEYS * 100, 32)]
)
def test_one_token_is_split_by_its_own_length_only(num_keys: int, num_parts: int) -> None:
    neighbours = [(0, 40), (5000, 5001)]
    for spans in ([(num_keys - 1, num_keys)], [*neighbours, (num_keys - 1, num_keys)]):
        runs = tables(spans, 16)
        arrays = flatten_runs(runs, 16, 16 * sum(len(run.pages) for run in runs))
        plan = plan_attention(arrays, group_size=3, sliding_window=None, wide_rows=64)
        token = sum(end - start for start, end in spans) - 1
        assert [int(merge[2]) for merge in plan.merges if merge[0] == token] == ([num_parts] if num_parts else [])


def test_slots_and_page_table_follow_the_tables() -> None:
    runs = [
        RunTable(np.array([7, 2, 9], dtype=np.int32), 3, 6),  # its third page covers nothing yet
        RunTable(np.array([4], dtype=np.int32), 0, 2),
    ]
    arrays = flatten_runs(runs, 4, 40)
    assert arrays.slots.tolist() == [31, 8, 9, 16, 17]
    assert arrays.page_table.tolist() == [7, 2, 4]
    assert arrays.table_begins.tolist() == [0, 2]
    assert arrays.first_tokens.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("pages", "start", "end", "message"),
    [
        ([0, 1], 0, 9, "run [0, 9) is empty or does not fit its 2 pages of 4 slots"),
        ([0, 1], 4, 4, "run [4, 4) is empty"),
        ([0, 10], 0, 8, "has pages 0 to 10; the pool has pages 0 to 9"),
        ([-1, 1], 0, 8, "has pages -1 to 1"),
    ],
)
def test_refuses_runs_that_do_not_fit(pages: list[int], start: int, end: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        flatten_runs([RunTable(np.array(pages, dtype=np.int32), start, end)], 4, 40)


def test_accepts_runs_at_the_limit() -> None:
    assert len(flatten_runs([RunTable(np.array([0, 9], dtype=np.int32), 7, 8)], 4, 40).slots) == 1


def test_refuses_a_pass_without_runs() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        flatten_runs([], 4, 40)
