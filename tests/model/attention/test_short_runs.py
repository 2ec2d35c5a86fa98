"""Short runs in one compiled loop, against the reference, and which runs join."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcomm.model.attention.contract import RunTable
from kvcomm.model.attention.pieces import Piece, Scoring, TailPiece
from kvcomm.model.attention.planner import PassPlanner
from kvcomm.model.attention.reference import paged_attention_reference
from kvcomm.model.attention.short_runs import (
    MAX_ROWS,
    MAX_SLOTS,
    ShortRunsPiece,
    can_join,
    compile_loop,
    join_short_runs,
)
from kvcomm.model.attention.short_runs_loop import attend, exp
from kvcomm.model.attention.torch_backend import TorchBackend

PAGE_SIZE = 16

MOST_ROWS = MAX_ROWS[torch.float32]


def run(num_rows: int, end: int, *, page: int = 0, step: int = 1) -> RunTable:
    """The last rows of a sequence whose pages begin with `page`; with another step than 1 they are scattered."""
    pages = page + step * np.arange(-(-end // PAGE_SIZE), dtype=np.int32)
    return RunTable(pages, end - num_rows, end)


def joined(*runs: RunTable) -> list[Piece]:
    return join_short_runs(PassPlanner(runs, PAGE_SIZE, torch.device("cpu")).pieces(None))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def passes(draw: st.DrawFn) -> list[RunTable]:
    ids = draw(st.permutations(range(80)))
    runs = []
    for _ in range(draw(st.integers(2, 5))):
        num_rows = draw(st.integers(2, MOST_ROWS))
        end = num_rows + draw(st.integers(1, 200))
        num_pages = -(-end // PAGE_SIZE)
        runs.append(RunTable(np.array(ids[:num_pages], dtype=np.int32), end - num_rows, end))
        ids = ids[num_pages:]
    return runs


@given(
    runs=passes(),
    heads=st.sampled_from([(1, 1), (9, 3), (8, 2), (5, 5)]),
    dims=st.sampled_from([(1, 1), (8, 8), (24, 16), (64, 64)]),
    num_threads=st.sampled_from([1, 8]),
    scale=st.sampled_from([0.3, -0.3, 0.0]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
)
def test_the_loop_is_the_reference(
    runs: list[RunTable],
    heads: tuple[int, int],
    dims: tuple[int, int],
    num_threads: int,
    scale: float,
    softcap: float | None,
) -> None:
    pieces = joined(*runs)
    (piece,) = pieces
    assert isinstance(piece, ShortRunsPiece)
    num_rows = sum(each.end - each.start for each in runs)
    query = random(heads[0], num_rows, dims[0])
    keys, values = random(80 * PAGE_SIZE, heads[1], dims[0], seed=1), random(80 * PAGE_SIZE, heads[1], dims[1], seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: num_threads)  # decides how finely work is cut
        out, lse = piece.attend(query, keys, values, Scoring(scale, softcap))
    assert lse is not None
    expected, expected_lse = paged_attention_reference(
        query[None], keys, values, runs, PAGE_SIZE, scale, None, softcap=softcap
    )
    torch.testing.assert_close(out.transpose(0, 1)[None], expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(lse.T[None], expected_lse, rtol=1e-6, atol=1e-5)


@given(cut=st.lists(st.tuples(st.integers(1, MOST_ROWS), st.integers(1, 300)), min_size=2, max_size=6), data=st.data())
def test_decode_beside_a_prompt_is_the_reference(cut: list[tuple[int, int]], data: st.DataObject) -> None:
    """As the back end plans it: rows of decode join, those of the prompt stay what they were."""
    ids = iter(data.draw(st.permutations(range(160))))
    sizes = [(100, data.draw(st.integers(0, 200))), *cut]
    order = data.draw(st.permutations(sizes))
    runs = []
    for num_rows, num_before in order:
        end = num_before + num_rows
        runs.append(
            RunTable(np.array([next(ids) for _ in range(-(-end // PAGE_SIZE))], dtype=np.int32), num_before, end)
        )
    query = random(6, sum(num_rows for num_rows, _ in sizes), 8)
    keys, values = random(160 * PAGE_SIZE, 3, 8, seed=1), random(160 * PAGE_SIZE, 3, 8, seed=2)
    step = TorchBackend().prepare(runs, [keys.clone()], [values.clone()], PAGE_SIZE)
    # What the pass writes is what is there already: only reading is looked at.
    new = [_written(stored, runs) for stored in (keys, values)]
    out = step(0, query[None], *new, scale=0.3, sliding_window=None)
    expected, _ = paged_attention_reference(query[None], keys, values, runs, PAGE_SIZE, 0.3, None)
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-6)


def _written(stored: Tensor, runs: list[RunTable]) -> Tensor:
    """[1, num_heads, num_rows, dim]: what lies in the slots of the runs' rows."""
    positions = [(each, position) for each in runs for position in range(each.start, each.end)]
    slots = [int(each.pages[at // PAGE_SIZE]) * PAGE_SIZE + at % PAGE_SIZE for each, at in positions]
    return stored[slots].transpose(0, 1)[None]


def test_large_scores_do_not_overflow() -> None:
    runs = [run(3, 90, page=1), run(2, 40, page=10)]
    (piece,) = joined(*runs)
    query, keys, values = 300 * random(2, 5, 8), 300 * random(400, 1, 8, seed=1), random(400, 1, 8, seed=2)
    out, _ = piece.attend(query, keys, values, Scoring(1.0))
    expected, _ = paged_attention_reference(query[None], keys, values, runs, PAGE_SIZE, 1.0, None)
    torch.testing.assert_close(out.transpose(0, 1)[None], expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_a_number_stays_so_in_its_row_alone() -> None:
    (piece,) = joined(run(3, 90, page=1), run(2, 40, page=10))
    query = random(2, 5, 8)
    query[1, 3, 0] = torch.nan
    out, _ = piece.attend(query, random(400, 1, 8, seed=1), random(400, 1, 8, seed=2), Scoring(0.3))
    assert out[1, 3].isnan().all()
    assert not out[0].isnan().any()
    assert not out[1, [0, 1, 2, 4]].isnan().any()


def test_exp_is_as_exact_as_float32_allows() -> None:
    x = -np.geomspace(1e-9, 87, 20_000, dtype=np.float32)
    got = np.array([exp(each) for each in x])
    wanted = np.exp(x.astype(np.float64))
    assert float(np.abs(got / wanted - 1).max()) < 3e-7
    assert exp(np.float32(0)) == 1
    assert 0 <= exp(np.float32("-inf")) < 1e-37
    assert np.isnan(exp(np.float32("nan")))


def test_runs_that_would_cost_more_stay_alone() -> None:
    many_rows, far = run(MOST_ROWS + 1, 90, page=1), run(2, MAX_SLOTS + 1, page=100)
    first, second = run(2, 60, page=10), run(3, 50, page=20)
    pieces = joined(many_rows, first, far, second)
    assert [type(piece) for piece in pieces] == [ShortRunsPiece, TailPiece, TailPiece]
    assert isinstance(pieces[0].rows, Tensor)
    assert pieces[0].rows.tolist() == [9, 10, 13, 14, 15]


def test_a_run_of_one_row_may_see_more() -> None:
    planned = PassPlanner(
        [run(1, 2048, page=1), run(1, 1500, page=200), run(1, 2049, page=300), run(2, 1025, page=500)],
        PAGE_SIZE,
        torch.device("cpu"),
        joined_dtype=torch.float32,
    )
    first, *others = join_short_runs(planned.pieces(None))
    assert isinstance(first, ShortRunsPiece)
    assert _members(first).tolist() == [0, 1]
    assert not any(isinstance(piece, ShortRunsPiece) for piece in others)


def test_one_run_alone_joins_where_its_slots_are_scattered() -> None:
    assert [type(piece) for piece in joined(run(4, 100))] == [TailPiece]
    assert [type(piece) for piece in joined(run(4, 100, step=2))] == [ShortRunsPiece]


def test_other_pieces_of_the_pass_stay() -> None:
    pieces = joined(run(2, 60, page=10), RunTable(np.arange(30, 40, dtype=np.int32), 0, 100), run(2, 50, page=20))
    assert len(pieces) == 2
    assert [piece.merge for piece in pieces] == [False, False]
    rows = np.concatenate([_members(piece) for piece in pieces])
    assert sorted(rows.tolist()) == list(range(104))


def _members(piece: Piece) -> np.ndarray:
    rows = piece.rows
    return np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.numpy()


def test_no_pass_waits_for_the_compiler() -> None:
    """Operands of another layout or type would be compiled for anew, which takes seconds."""
    compile_loop()
    known = list(attend.signatures)  # what other tests of this process have asked for is among them
    for runs in ([run(4, 100, step=2)], [run(3, 90, page=1), run(2, 40, page=10)]):
        (piece,) = joined(*runs)
        query = random(1, 20, 6, 8)[0, : runs[0].end - runs[0].start + 2 * (len(runs) - 1)].transpose(0, 1)
        piece.attend(query, random(400, 2, 8), random(400, 2, 8), Scoring(0.3))
    assert attend.signatures == known


def test_storages_that_cannot_be_read_in_place_do_not_join() -> None:
    assert can_join(torch.zeros(4, 2, 8))
    assert can_join(torch.zeros(4, 2, 8, dtype=torch.bfloat16))
    assert not can_join(torch.zeros(4, 2, 8, dtype=torch.float16))
    assert not can_join(torch.zeros(2, 4, 8).transpose(0, 1))


def test_buffers_are_made_once_for_layers_alike() -> None:
    (piece,) = joined(run(3, 90, page=1), run(2, 40, page=10))
    assert isinstance(piece, ShortRunsPiece)
    for _ in range(2):
        piece.attend(random(2, 5, 8), random(400, 1, 8), random(400, 1, 8), Scoring(0.3))
    piece.attend(random(4, 5, 8), random(400, 2, 8), random(400, 2, 8), Scoring(0.3))
    assert len(piece.buffers) == 2
