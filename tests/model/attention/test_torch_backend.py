"""The torch back end against the reference: scattered pages, grouped heads, shared prefixes, windows, fresh NaN.

Values are unit normals, so outputs are at most about 4; FLOOR is the absolute error allowed against float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcomm.model.attention import make_backend, pieces
from kvcomm.model.attention.contract import RunTable
from kvcomm.model.attention.reference import paged_attention_reference
from kvcomm.model.attention.torch_backend import TorchBackend

PAGE_SIZE = 16
NUM_PAGES = 160
FLOOR = {
    torch.float32: 5e-6,  # sums of 500 products in another order
    torch.bfloat16: 2e-2,  # outputs here stay below 1: weights, sum and each merge round by up to 2^-9
}
INT_VIEW = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
LENGTHS = (1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 63, 500)


class Case:
    """Runs over a pool whose unused slots are NaN, with KV of the past in place and that of the runs still to come."""

    def __init__(
        self,
        runs: Sequence[RunTable],
        *,
        heads: tuple[int, int] = (6, 2),
        dims: tuple[int, int] = (8, 8),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.runs = runs
        num_heads, num_kv_heads = heads
        generator = torch.Generator().manual_seed(0)
        num_tokens = sum(run.end - run.start for run in runs)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.query = random(1, num_heads, num_tokens, dims[0])
        self.key, self.value = (
            random(1, num_kv_heads, num_tokens, dims[0]),
            random(1, num_kv_heads, num_tokens, dims[1]),
        )
        self.keys, self.values = (
            torch.full((NUM_PAGES * PAGE_SIZE, num_kv_heads, dim), torch.nan, dtype=dtype) for dim in dims
        )
        past = np.unique(np.concatenate([slots_of(run, 0, run.end) for run in runs]))
        self.keys[past], self.values[past] = (
            random(len(past), num_kv_heads, dims[0]),
            random(len(past), num_kv_heads, dims[1]),
        )
        self.written = np.concatenate([slots_of(run, run.start, run.end) for run in runs])
        self.keys[self.written], self.values[self.written] = torch.nan, torch.nan

    def check(
        self,
        *,
        window: int | None = None,
        atol: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Run the step on layer 1 of 2 and compare everything it returns, writes and must leave alone."""
        keys, values = [torch.empty(0), self.keys.clone()], [torch.empty(0), self.values.clone()]
        inputs = [tensor.clone() for tensor in (self.query, self.key, self.value)]
        step = TorchBackend().prepare(self.runs, keys, values, PAGE_SIZE)
        asked: Any = {"scale": 0.35, "sliding_window": window, "softcap": softcap, "sinks": sinks}
        out = step(1, self.query, self.key, self.value, **asked)
        self._check_storage(keys[1], self.keys, self.key)
        self._check_storage(values[1], self.values, self.value)
        for tensor, before in zip((self.query, self.key, self.value), inputs, strict=True):
            assert torch.equal(tensor, before)
        expected, _ = paged_attention_reference(
            self.query.float(),
            keys[1].float(),
            values[1].float(),
            self.runs,
            PAGE_SIZE,
            0.35,
            window,
            softcap=softcap,
            sinks=sinks,
        )
        assert (out.shape, out.dtype) == (expected.shape, self.query.dtype)
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=atol or FLOOR[out.dtype])
        again = step(1, self.query, self.key, self.value, **asked)
        assert torch.equal(out, again)
        return out

    def _check_storage(self, after: Tensor, before: Tensor, new: Tensor) -> None:
        assert torch.equal(after[self.written], new[0].transpose(0, 1))
        expected = before.clone()
        expected[self.written] = after[self.written]
        bits = INT_VIEW[after.dtype]
        assert torch.equal(after.view(bits), expected.view(bits))


def slots_of(run: RunTable, start: int, end: int) -> np.ndarray:
    positions = np.arange(start, end)
    return run.pages[positions // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + positions % PAGE_SIZE


def tables(*lengths: int, scattered: bool = True) -> list[np.ndarray]:
    """Page tables of separate sequences, from all over the pool or in a row."""
    ids = np.random.default_rng(0).permutation(NUM_PAGES) if scattered else np.arange(3, NUM_PAGES)
    ends = np.cumsum([-(-length // PAGE_SIZE) for length in lengths])
    return [part.astype(np.int32) for part in np.split(ids, ends)[:-1]]


def forks() -> list[np.ndarray]:
    """Tables of four leaves under two branches under one root: 96, then 80, then 32 tokens."""
    ids = np.random.default_rng(1).permutation(NUM_PAGES).astype(np.int32)
    root, left, right, *own = np.split(ids[:24], [6, 11, 16, 18, 20, 22])
    return [np.concatenate([root, branch, tail]) for branch, tail in zip((left, right, left, right), own, strict=True)]


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)])
@pytest.mark.parametrize("length", LENGTHS)
def test_full_prefill(length: int, heads: tuple[int, int], scattered: bool) -> None:
    (pages,) = tables(length, scattered=scattered)
    Case([RunTable(pages, 0, length)], heads=heads).check()


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)])
def test_ragged_batch_of_every_length(heads: tuple[int, int], scattered: bool) -> None:
    runs = [
        RunTable(pages, 0, length) for pages, length in zip(tables(*LENGTHS, scattered=scattered), LENGTHS, strict=True)
    ]
    Case(runs, heads=heads).check()


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)])
def test_decode_of_every_length(heads: tuple[int, int], scattered: bool) -> None:
    runs = [
        RunTable(pages, length - 1, length)
        for pages, length in zip(tables(*LENGTHS, scattered=scattered), LENGTHS, strict=True)
    ]
    Case(runs, heads=heads).check()


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)])
@pytest.mark.parametrize("lengths", [(290, 290, 290), (290, 300, 270, 310), (150, 520, 290, 131), (129, 129)])
def test_streams_that_share_nothing(lengths: tuple[int, ...], heads: tuple[int, int]) -> None:
    """Evenly spaced or not, of one length or several; one of them behind a prefix from elsewhere in the pool."""
    pages = tables(*lengths, scattered=False)
    pages[-1][-1] = NUM_PAGES - 1
    Case([RunTable(own, length - 1, length) for own, length in zip(pages, lengths, strict=True)], heads=heads).check()


@pytest.mark.parametrize("most_gathered", [0, 1024])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("num_rows", [2, 3, 17, 63, 64, 65])
def test_short_runs_behind_a_prefix(
    num_rows: int, scattered: bool, most_gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "MAX_GATHERED_TOKENS", most_gathered)
    first, second = tables(300, 80, scattered=scattered)
    Case([RunTable(first, 300 - num_rows, 300), RunTable(second, 80 - num_rows, 80)]).check()


@pytest.mark.parametrize("scattered", [False, True])
def test_chunks_and_decodes_together(scattered: bool) -> None:
    first, second, third, fourth = tables(300, 40, 90, 17, scattered=scattered)
    runs = [RunTable(first, 130, 230), RunTable(second, 38, 39), RunTable(third, 15, 18), RunTable(fourth, 0, 17)]
    Case(runs).check()


@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_several_runs_of_one_sequence_in_any_order(window: int | None) -> None:
    (pages,) = tables(300)
    runs = [RunTable(pages, 200, 203), RunTable(pages, 20, 61), RunTable(pages, 299, 300), RunTable(pages, 100, 117)]
    Case(runs).check(window=window)


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)])
@pytest.mark.parametrize("num_new", [1, 2, 20])
def test_nested_forks(num_new: int, heads: tuple[int, int]) -> None:
    runs = [RunTable(pages, 208 - num_new - index, 208 - index) for index, pages in enumerate(forks())]
    Case(runs, heads=heads).check()


@pytest.mark.parametrize("window", [1, 2, 15, 64, 65, 499, 500])
@pytest.mark.parametrize("scattered", [False, True])
def test_windows(scattered: bool, window: int) -> None:
    first, second, third = tables(500, 130, 63, scattered=scattered)
    runs = [RunTable(first, 0, 500), RunTable(second, 129, 130), RunTable(third, 20, 63)]
    Case(runs).check(window=window)


def test_layers_with_and_without_window_share_a_pass() -> None:
    """Pieces are planned once per window; a plan of one layer must not serve another."""
    case = Case([RunTable(pages, 30, 90) for pages in tables(90, 90)])
    outs = [case.check(window=window) for window in (None, 20, None, 1000, 20)]
    step = TorchBackend().prepare(case.runs, [case.keys] * 5, [case.values] * 5, PAGE_SIZE)
    for layer_id, (window, out) in enumerate(zip((None, 20, None, 1000, 20), outs, strict=True)):
        got = step(layer_id, case.query, case.key, case.value, scale=0.35, sliding_window=window)
        assert torch.equal(got, out)
    assert not torch.equal(outs[0], outs[1])


SHAPED: dict[str, dict[str, Any]] = {
    "a cap": {"softcap": 0.7},
    "sinks": {"sinks": torch.tensor([-3.0, 0.0, 2.0, 5.0, 9.0, 90.0])},
    "a cap and sinks": {"softcap": 0.7, "sinks": torch.tensor([-9.0, -1.0, 0.0, 0.5, 2.0, 9.0])},
    "sinks that change nothing": {"sinks": torch.full((6,), -torch.inf)},
}


def passes() -> dict[str, list[RunTable]]:
    """Every kind of piece: causal, behind a prefix, shared, single rows, short runs, gaps, long scattered tails."""
    first, second, third, fourth = tables(500, 500, 500, 500)
    long = tables(1500)[0]
    return {
        "a prompt": [RunTable(first, 0, 500)],
        "a rest": [RunTable(first, 100, 500)],
        "a short tail, long and scattered": [RunTable(long, 1470, 1500)],
        "decode": [RunTable(pages, 400 + index, 401 + index) for index, pages in enumerate((first, second, third))],
        "forks that decode": [RunTable(pages, 207, 208) for pages in forks()],
        "forks that read on": [RunTable(pages, 180, 208) for pages in forks()],
        "short runs": [RunTable(pages, 96, 100) for pages in (first, second, third)],
        "recomputed tokens": [RunTable(first, start, start + 2) for start in range(300, 400, 9)],
        "all at once": [
            RunTable(first, 0, 300),
            RunTable(second, 15, 17),
            RunTable(third, 399, 400),
            RunTable(fourth, 60, 67),
        ],
    }


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("shaped", SHAPED.values(), ids=SHAPED.keys())
@pytest.mark.parametrize("name", sorted(passes()))
def test_caps_and_sinks(name: str, shaped: dict[str, Any], window: int | None) -> None:
    """In a row that several pieces serve a sink counts once, and a cap comes before anything is hidden."""
    Case(passes()[name]).check(window=window, **shaped)


@pytest.mark.parametrize("shaped", SHAPED.values(), ids=SHAPED.keys())
def test_caps_and_sinks_in_bfloat16(shaped: dict[str, Any]) -> None:
    Case(passes()["forks that decode"], dtype=torch.bfloat16).check(**shaped)


def test_what_products_compute_comes_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MAX_SCORES", 6 * 500 * 7)
    for name in ("a prompt", "a rest"):
        Case(passes()[name]).check(softcap=0.7)
        Case(passes()[name]).check(softcap=0.7, window=100)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("dims", [(8, 16), (16, 8)])
def test_values_of_another_size_than_keys(dims: tuple[int, int], window: int | None) -> None:
    first, second, third, fourth = forks()
    runs = [RunTable(first, 207, 208), RunTable(second, 180, 208), RunTable(third, 206, 207), RunTable(fourth, 0, 96)]
    Case(runs[:3], dims=dims).check(window=window)
    Case(runs[3:], dims=dims).check(window=window)


@pytest.mark.parametrize("window", [None, 30])
def test_bfloat16(window: int | None) -> None:
    Case(
        [RunTable(pages, 207 - 3 * index, 208 - index) for index, pages in enumerate(forks())], dtype=torch.bfloat16
    ).check(window=window)


def test_large_scores_do_not_overflow_when_pieces_are_merged() -> None:
    case = Case([RunTable(pages, 207, 208) for pages in forks()])
    case.query *= 100
    # Scores near 200 carry rounding errors of 2e-5, and the weights with them.
    assert bool(case.check(atol=1e-4).isfinite().all())


def test_strided_queries_and_keys_are_taken() -> None:
    """transformers hands over transposed views, not contiguous tensors."""
    case = Case([RunTable(pages, 40, 60) for pages in tables(60, 60)])
    for name in ("query", "key", "value"):
        tensor = getattr(case, name)
        setattr(case, name, tensor.transpose(1, 2).contiguous().transpose(1, 2))
    assert not case.query.is_contiguous()
    case.check()


def test_it_is_the_back_end_called_torch() -> None:
    assert make_backend("torch", "cpu").name == "torch"
