"""Every row sees exactly the slots it may see, each once: counted piece by piece, over random page tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kvcomm.model.attention import pieces as pieces_module
from kvcomm.model.attention import planner, short_runs, single_rows
from kvcomm.model.attention.contract import RunTable
from kvcomm.model.attention.pieces import (
    CausalPiece,
    FullPiece,
    Index,
    MaskedPiece,
    PaddedPiece,
    Piece,
    StridedPiece,
    TailPiece,
)
from kvcomm.model.attention.planner import MIN_SHARED_TOKENS, PassPlanner

CPU = torch.device("cpu")
MAX_TOKENS = 160

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pass:
    """Runs over one pool."""

    runs: tuple[RunTable, ...]
    page_size: int

    @property
    def num_rows(self) -> int:
        return sum(run.end - run.start for run in self.runs)

    @property
    def num_slots(self) -> int:
        return (max(int(run.pages.max()) for run in self.runs) + 1) * self.page_size

    def planner(self, *, joined_dtype: torch.dtype | None = None) -> PassPlanner:
        return PassPlanner(self.runs, self.page_size, CPU, joined_dtype=joined_dtype)

    def slot(self, run: RunTable, position: int) -> int:
        return int(run.pages[position // self.page_size]) * self.page_size + position % self.page_size

    def expected(self, window: int | None) -> Counts:
        """[num_rows, num_slots]: 1 where the row may see the slot, straight from the definition."""
        counts = np.zeros((self.num_rows, self.num_slots), dtype=np.int64)
        row = 0
        for run in self.runs:
            slots = [self.slot(run, position) for position in range(run.end)]
            for position in range(run.start, run.end):
                first = 0 if window is None else max(0, position - window + 1)
                counts[row, slots[first : position + 1]] += 1
                row += 1
        return counts


@st.composite
def passes(draw: st.DrawFn, *, are_served: bool = False) -> Pass:
    """Sequences that fork from each other at page boundaries, each with one to three runs, in random order.

    Those of a pass that serves requests keep the runs of a sequence together, and write no page that another holds.
    """
    page_size = draw(st.sampled_from([1, 4, 16]))
    ids = list(range(400 if page_size == 1 else 200))
    if draw(st.booleans()):
        draw(st.randoms(use_true_random=False)).shuffle(ids)
    sharable: list[list[int]] = []
    sequences: list[list[RunTable]] = []
    for _ in range(draw(st.integers(1, 5))):
        parent = draw(st.sampled_from(sharable)) if sharable and draw(st.booleans()) else []
        shared = parent[: draw(st.integers(0, len(parent)))]
        end = draw(st.integers(1, MAX_TOKENS // 2)) + len(shared) * page_size
        num_own = -(-end // page_size) - len(shared)
        table = [*shared, *ids[:num_own]]
        ids = ids[num_own:] + ids[:num_own]  # a table never meets the same page twice: the list is long enough
        first_written = len(shared) * page_size if are_served else 0
        cuts = sorted(
            draw(st.sets(st.integers(first_written, end), min_size=2, max_size=min(6, end - first_written + 1)))
        )
        runs = [
            RunTable(np.array(table, dtype=np.int32), stop - 1 if draw(st.booleans()) else start, stop)
            for start, stop in zip(cuts[0::2], cuts[1::2], strict=False)
        ]
        sequences.append(runs)
        sharable.append(table[: runs[0].start // page_size] if are_served else table)
    if are_served:
        return Pass(tuple(run for runs in draw(st.permutations(sequences)) for run in runs), page_size)
    return Pass(tuple(draw(st.permutations([run for runs in sequences for run in runs]))), page_size)


def members(index: Index) -> npt.NDArray[np.int64]:
    return np.arange(index.start, index.stop) if isinstance(index, slice) else index.numpy()


def visible_pairs(piece: Piece) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Every (row, slot) the piece computes a score for that counts."""
    rows = members(piece.rows)
    if isinstance(piece, PaddedPiece):
        slots, visible = piece.slots.numpy(), piece.visible.numpy()
        return np.repeat(rows, slots.shape[1])[visible.ravel()], slots.ravel()[visible.ravel()]
    if isinstance(piece, StridedPiece):
        assert piece.num_rows == len(rows)
        stretch = np.arange(piece.num_slots)
        return np.repeat(rows, piece.num_slots), np.concatenate(
            [piece.first + index * piece.stride + stretch for index in range(piece.num_rows)]
        )
    assert isinstance(piece, FullPiece | CausalPiece | MaskedPiece | TailPiece)
    parts = piece.parts if isinstance(piece, TailPiece) else (piece.slots,)
    slots = np.concatenate([members(part) for part in parts])
    visible = np.ones((len(rows), len(slots)), dtype=bool)
    if isinstance(piece, CausalPiece):
        visible = np.tri(len(rows), len(slots), dtype=bool)
    elif isinstance(piece, TailPiece):
        visible = np.tri(len(rows), len(slots), len(slots) - len(rows), dtype=bool)
    elif isinstance(piece, MaskedPiece):
        visible = piece.visible.numpy()
        assert visible.shape == (len(rows), len(slots))
    at_row, at_slot = np.nonzero(visible)
    return rows[at_row], slots[at_slot]


def counted(case: Pass, pieces: Sequence[Piece]) -> Counts:
    """[num_rows, num_slots]: in how many pieces the row sees the slot. Checks the order of merging on the way."""
    counts = np.zeros((case.num_rows, case.num_slots), dtype=np.int64)
    for piece in pieces:
        rows = members(piece.rows)
        has_result = counts[rows].any(axis=1)
        assert (has_result == piece.merge).all(), "a row is merged into nothing, or overwritten"
        np.add.at(counts, visible_pairs(piece), 1)
    return counts


@given(
    case=passes(),
    view=st.sampled_from([1, 8, 256]),
    padded=st.sampled_from([0, 16, 128]),
    tail=st.sampled_from([1, 8, 64]),
    cluster=st.sampled_from([0, 24, 512]),
)
def test_every_row_sees_its_slots_once(case: Pass, view: int, padded: int, tail: int, cluster: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "MIN_VIEW_TOKENS", view)
        patch.setattr(single_rows, "MAX_PADDED_TOKENS", padded)
        patch.setattr(planner, "MAX_TAIL_ROWS", tail)
        patch.setattr(planner, "MAX_CLUSTER_TOKENS", cluster)
        pieces = case.planner().pieces(None)
    assert np.array_equal(counted(case, pieces), case.expected(None))


@given(case=passes(), min_shared=st.sampled_from([1, 8, 40]))
def test_every_row_sees_its_slots_once_when_short_stretches_are_shared(case: Pass, min_shared: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "MIN_SHARED_TOKENS", min_shared)
        pieces = case.planner().pieces(None)
    assert np.array_equal(counted(case, pieces), case.expected(None))


@given(case=passes(), rows=st.sampled_from([1, 8, 200]), share=st.sampled_from([0.0, 0.5, 0.9]))
def test_every_row_sees_its_slots_once_when_short_runs_join(case: Pass, rows: int, share: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(short_runs, "MAX_ROWS", {torch.float32: rows})
        patch.setattr(planner, "MIN_DISTINCT_SHARE", share)
        pieces = case.planner(joined_dtype=torch.float32).pieces(None)
    assert np.array_equal(counted(case, pieces), case.expected(None))


@given(case=passes(), window=st.integers(1, MAX_TOKENS + 20))
def test_every_row_sees_its_window_once(case: Pass, window: int) -> None:
    planned = case.planner()
    effective = planned.effective_window(window)
    assert effective == (None if window >= max(run.end for run in case.runs) else window)
    assert np.array_equal(counted(case, planned.pieces(effective)), case.expected(window))


@given(case=passes(are_served=True))
@example(
    case=Pass(  # two runs of one sequence, close behind each other, and a third of it elsewhere in the pass
        (
            RunTable(np.arange(1, 69, dtype=np.int32), 66, 67),
            RunTable(np.arange(100, 101, dtype=np.int32), 0, 1),
            RunTable(np.arange(1, 69, dtype=np.int32), 64, 65),
            RunTable(np.arange(1, 69, dtype=np.int32), 65, 66),
        ),
        page_size=1,
    )
)
def test_shared_slots_are_read_once_but_for_a_short_rest(case: Pass) -> None:
    """Of what a run shares with any other run, fewer than MIN_SHARED_TOKENS slots are read for it alone."""
    run_of_row = np.repeat(np.arange(len(case.runs)), [run.end - run.start for run in case.runs])
    alone: defaultdict[int, set[int]] = defaultdict(set)
    for piece in case.planner().pieces(None):
        rows, slots = visible_pairs(piece)
        served = np.unique(run_of_row[rows])
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
            if isinstance(piece, PaddedPiece | StridedPiece) or len(served) == 1:
                alone[int(run_of_row[row])].add(slot)
    for index, run in enumerate(case.runs):
        common = max((_num_common(run, other, case.page_size) for other in _others(case.runs, index)), default=0)
        shared = {case.slot(run, position) for position in range(common * case.page_size)}
        assert len(alone[index] & shared) < MIN_SHARED_TOKENS


def _others(runs: Sequence[RunTable], index: int) -> list[RunTable]:
    return [run for other, run in enumerate(runs) if other != index]


def _num_common(first: RunTable, second: RunTable, page_size: int) -> int:
    """Leading pages that both tables hold and both runs have wholly behind them."""
    num = min(first.start, second.start) // page_size
    differs = np.flatnonzero(first.pages[:num] != second.pages[:num])
    return int(differs[0]) if differs.size else num


def table(*page_ids: int) -> npt.NDArray[np.int32]:
    return np.array(page_ids, dtype=np.int32)


def decode(pages: npt.NDArray[np.int32], end: int) -> RunTable:
    return RunTable(pages, end - 1, end)


def test_a_full_prefill_is_one_causal_view() -> None:
    """The very call stock SDPA makes, so it is bit-identical."""
    runs = [RunTable(np.arange(7, 17, dtype=np.int32), 0, 155)]
    (piece,) = PassPlanner(runs, 16, CPU).pieces(None)
    assert piece == CausalPiece(slice(112, 267), slice(0, 155), merge=False)


def test_a_lone_decode_over_consecutive_pages_is_one_view() -> None:
    (piece,) = PassPlanner([decode(np.arange(3, 13, dtype=np.int32), 150)], 16, CPU).pieces(None)
    assert piece == FullPiece(slice(48, 198), slice(0, 1), merge=False)


@pytest.mark.parametrize(("num_shared", "is_shared"), [(3, False), (4, True)])
def test_sharing_starts_at_the_limit(num_shared: int, is_shared: bool) -> None:
    """64 tokens are attended once for all, one page less for each alone."""
    assert MIN_SHARED_TOKENS == 64
    shared = list(range(num_shared))
    runs = [decode(table(*shared, 20 + fork), num_shared * 16 + 5) for fork in range(3)]
    pieces = PassPlanner(runs, 16, CPU).pieces(None)
    first = FullPiece(slice(0, num_shared * 16), slice(0, 3), merge=False)
    assert (first in pieces) == is_shared
    assert [type(piece) for piece in pieces] == ([FullPiece, PaddedPiece] if is_shared else [PaddedPiece])


def test_evenly_spaced_streams_are_read_by_one_call() -> None:
    runs = [decode(np.arange(20 * stream, 20 * stream + 18, dtype=np.int32), 280) for stream in (2, 0, 1, 3)]
    (piece,) = PassPlanner(runs, 16, CPU).pieces(None)
    assert isinstance(piece, StridedPiece)
    assert (piece.first, piece.stride, piece.num_slots) == (0, 320, 280)
    assert members(piece.rows).tolist() == [1, 2, 0, 3]


def test_streams_of_other_lengths_are_read_to_the_shortest_and_their_rests_padded() -> None:
    starts, ends = (0, 50, 90, 300), (280, 300, 281, 300)
    runs = [decode(np.arange(start, start + 20, dtype=np.int32), end) for start, end in zip(starts, ends, strict=True)]
    pieces = PassPlanner(runs, 16, CPU).pieces(None)
    assert [type(piece) for piece in pieces] == [StridedPiece, StridedPiece, PaddedPiece]
    assert [piece.num_slots for piece in pieces if isinstance(piece, StridedPiece)] == [280, 281]
    assert isinstance(pieces[2], PaddedPiece)
    assert pieces[2].visible.sum(1).tolist() == [20, 19]


def test_streams_of_very_different_length_are_read_each_for_itself() -> None:
    runs = [decode(np.arange(100), 1500), decode(np.arange(100, 120), 300)]
    pieces = PassPlanner(runs, 16, CPU).pieces(None)
    assert pieces == [
        FullPiece(slice(1600, 1900), slice(1, 2), merge=False),
        FullPiece(slice(0, 1500), slice(0, 1), merge=False),
    ]


def test_hits_on_one_prefix_get_their_own_tails_from_one_padded_batch() -> None:
    """Eight streams behind cached prefixes made one call each for a tail of a few tokens."""
    runs = [decode(np.array([*range(20 * stream, 20 * stream + 16), 200 + 3 * stream]), 260) for stream in range(8)]
    pieces = PassPlanner(runs, 16, CPU).pieces(None)
    assert [type(piece) for piece in pieces] == [StridedPiece, PaddedPiece]


@pytest.mark.parametrize(("num_rows", "kinds"), [(64, [TailPiece]), (65, [FullPiece, CausalPiece])])
def test_a_short_run_alone_behind_its_prefix_is_one_piece(num_rows: int, kinds: list[type]) -> None:
    pieces = PassPlanner([RunTable(np.arange(40, dtype=np.int32), 400, 400 + num_rows)], 16, CPU).pieces(None)
    assert [type(piece) for piece in pieces] == kinds


def test_a_cached_prefix_and_the_tail_of_another_prompt_are_read_in_place() -> None:
    """Bug: pages of a hit that did not follow each other were all copied, in every layer."""
    (piece,) = PassPlanner([RunTable(table(*range(64), 70, 71), 1024, 1056)], 16, CPU).pieces(None)
    assert isinstance(piece, TailPiece)
    assert piece.parts == (slice(0, 1024), slice(1120, 1152))


def test_nested_forks_are_shared_at_every_depth() -> None:
    root, left, right = list(range(4)), list(range(10, 15)), list(range(20, 26))
    runs = [
        decode(table(*root, *left, 30), 150),
        decode(table(*root, *right, 31), 170),
        decode(table(*root, *left, 32), 149),
        decode(table(*root, *right, 33), 168),
    ]
    pieces = PassPlanner(runs, 16, CPU).pieces(None)
    read = [(len(members(p.slots)), members(p.rows).tolist()) for p in pieces if isinstance(p, FullPiece)]
    assert read == [(64, [0, 1, 2, 3]), (80, [0, 2]), (96, [1, 3])]
    assert [type(piece) for piece in pieces[3:]] == [PaddedPiece]


def test_a_stretch_too_short_for_all_is_shared_by_those_who_share_more() -> None:
    """Bug: three runs with 16 tokens in common hid that two of them had 160 in common; all were read alone."""
    runs = [
        decode(table(0, *range(1, 10), 30), 165),
        decode(table(0, 20, 21, 22, 23), 70),
        decode(table(0, *range(1, 10), 31), 166),
    ]
    pieces = PassPlanner(runs, 16, CPU).pieces(None)
    together = [piece for piece in pieces if members(piece.rows).tolist() == [0, 2]]
    assert [members(piece.slots).tolist() for piece in together if isinstance(piece, FullPiece)] == [list(range(160))]


def test_a_page_that_is_written_in_this_pass_is_not_past() -> None:
    """Two runs of one sequence share its pages, but the earlier run only those wholly before its start."""
    pages = np.arange(48, dtype=np.int32)
    runs = [RunTable(pages, 70, 80), RunTable(pages, 720, 728)]
    pieces = PassPlanner(runs, 16, CPU).pieces(None)
    assert pieces[0] == FullPiece(slice(0, 64), slice(0, 18), merge=False)
    case = Pass(tuple(runs), 16)
    assert np.array_equal(counted(case, pieces), case.expected(None))


def test_runs_close_behind_each_other_are_one_cluster() -> None:
    """Bug: each of the hundreds of short runs of a rung was attended for itself, which took three times as long."""
    pages = np.arange(100, dtype=np.int32)
    runs = [RunTable(pages, start, start + 3) for start in range(500, 1400, 8)]
    pieces = PassPlanner(runs, 16, CPU).pieces(None)
    # What both clusters see, what only the later one sees wholly, and the stretches they lie in.
    assert [type(piece) for piece in pieces] == [FullPiece, MaskedPiece, FullPiece, MaskedPiece]
    case = Pass(tuple(runs), 16)
    assert np.array_equal(counted(case, pieces), case.expected(None))


def test_runs_of_two_sequences_are_no_cluster() -> None:
    """They share what is before both, but what one writes the other does not see."""
    runs = [RunTable(table(*range(8), 20), 130, 134), RunTable(table(*range(8), 21), 138, 142)]
    case = Pass(tuple(runs), 16)
    pieces = PassPlanner(runs, 16, CPU).pieces(None)
    assert not any(isinstance(piece, MaskedPiece) for piece in pieces)
    assert np.array_equal(counted(case, pieces), case.expected(None))


def test_short_scattered_pages_are_gathered_and_long_stretches_are_views() -> None:
    pages = table(*range(50, 66), 3, 40, 41, 9, *range(70, 90))
    pieces = PassPlanner([RunTable(pages, 639, 640)], 16, CPU).pieces(None)
    kinds = [("view" if isinstance(p.slots, slice) else "gather", len(members(p.slots))) for p in pieces]
    assert kinds == [("view", 320), ("view", 256), ("gather", 64)]


def test_short_runs_that_join_are_planned_whole_beside_a_prompt() -> None:
    """Each was cut into stretches in place and a padded rest, merged afterwards."""
    runs = [
        RunTable(np.arange(40, dtype=np.int32), 400, 600),
        *(decode(np.arange(50 * stream, 50 * stream + 40, dtype=np.int32), 500 + 7 * stream) for stream in range(1, 4)),
    ]
    pieces = PassPlanner(runs, 16, CPU, joined_dtype=torch.float32).pieces(None)
    assert [type(piece) for piece in pieces] == [TailPiece, TailPiece, TailPiece, FullPiece, CausalPiece]
    kinds = [type(piece) for piece in PassPlanner(runs, 16, CPU).pieces(None)]
    assert TailPiece not in kinds
    assert StridedPiece in kinds


@pytest.mark.parametrize(("num_shared", "is_whole"), [(23, True), (24, False)])
def test_forks_of_one_context_do_not_read_it_each_for_itself(num_shared: int, is_whole: bool) -> None:
    """Three runs that read 31 pages each are planned whole as long as more than half of the 93 are different ones."""
    own = 31 - num_shared
    runs = [decode(np.array([*range(num_shared), *range(at, at + own)]), 490) for at in (100, 200, 300)]
    pieces = PassPlanner(runs, 16, CPU, joined_dtype=torch.float32).pieces(None)
    assert [isinstance(piece, TailPiece) for piece in pieces] == ([True] * 3 if is_whole else [False] * len(pieces))


def test_a_single_short_run_has_nothing_to_join() -> None:
    runs = [decode(np.arange(3, 13, dtype=np.int32), 150), RunTable(np.arange(20, 30, dtype=np.int32), 0, 100)]
    pieces = PassPlanner(runs, 16, CPU, joined_dtype=torch.float32).pieces(None)
    assert not any(isinstance(piece, TailPiece) for piece in pieces)


def test_write_slots_follow_the_runs() -> None:
    runs = [RunTable(table(5, 2), 3, 6), RunTable(table(7), 0, 1), RunTable(table(5, 2, 8), 9, 11)]
    slots = PassPlanner(runs, 4, CPU).write_slots()
    assert members(slots).tolist() == [23, 8, 9, 28, 33, 34]
    assert PassPlanner([RunTable(table(5, 6), 2, 7)], 4, CPU).write_slots() == slice(22, 27)


@pytest.mark.parametrize(("window", "effective"), [(None, None), (31, None), (30, None), (29, 29), (1, 1)])
def test_a_window_counts_only_where_it_hides_something(window: int | None, effective: int | None) -> None:
    pages = np.arange(8, dtype=np.int32)
    planned = PassPlanner([RunTable(pages, 4, 30), RunTable(pages, 0, 2)], 4, CPU)
    assert planned.effective_window(window) == effective
