"""The Triton kernels against the reference; collected only by test_triton.py, in a process of its own.

On CPU tensors in Triton's interpreter where TRITON_INTERPRET=1, else on the CUDA device. Fresh memory and unused pages
are NaN. Tolerance: the error against float32 is at most twice that of the same formula computed with everything
rounded to the working dtype (nothing, for float32), plus FLOOR_ULPS units in the last place of the largest output.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcomm.errors import InvalidRequest
from kvcomm.model.attention import triton_plan
from kvcomm.model.attention.contract import RunTable
from kvcomm.model.attention.reference import paged_attention_reference
from kvcomm.model.attention.triton import TritonBackend, TritonStep

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
FLOOR_ULPS = {
    torch.float32: 16,  # sums of up to 160 terms in another order
    torch.float16: 1,
    torch.bfloat16: 1,  # the interpreter truncates where a GPU rounds
}
INT_VIEW = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
FEW_KEYS = 32
"""Split runs of one token from here on, so that splits are cheap to test; the last tests use the real limit."""

Spans = list[tuple[int, int, int]]

LENGTHS: Spans = [(0, 0, 1), (1, 0, 3), (2, 0, 4), (3, 0, 5), (4, 0, 63)]  # 1, page - 1, page, page + 1, long
MIDDLE: Spans = [(0, 30, 41), (1, 33, 34), (0, 2, 5), (2, 6, 8), (0, 20, 28)]  # three runs of one sequence
DECODE: Spans = [(0, 0, 1), (1, 7, 8), (2, 62, 63), (3, 129, 130)]
SPLIT: Spans = [(0, 149, 150), (1, 9, 10), (2, 32, 33), (3, 31, 32)]  # with FEW_KEYS
SCENARIOS = {"lengths": LENGTHS, "middle": MIDDLE, "decode": DECODE, "split": SPLIT}


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def few_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_plan, "SPLIT_KEYS", FEW_KEYS)


class Case:
    """Runs over permuted pages of a pool that is larger than needed; slots of no sequence are NaN."""

    def __init__(
        self,
        spans: Spans,
        *,
        heads: tuple[int, int] = (3, 1),
        dims: tuple[int, int] = (16, 16),
        dtype: torch.dtype = torch.float32,
        page_size: int = 4,
        spread: int = 1,
    ) -> None:
        """`spread` > 1 leaves that many elements between neighbours of every innermost dimension."""
        self.page_size = page_size
        self.num_heads, num_kv_heads = heads
        generator = torch.Generator().manual_seed(0)
        ends = {index: max(end for i, _, end in spans if i == index) for index, _, _ in spans}
        counts = {index: -(-end // page_size) for index, end in ends.items()}
        ids = np.random.default_rng(0).permutation(sum(counts.values()) + 5).astype(np.int32)
        bounds = np.cumsum([0, *counts.values()])
        pages = {index: ids[a:b] for index, (a, b) in zip(counts, pairwise(bounds), strict=True)}
        self.runs = [RunTable(pages[index], start, end) for index, start, end in spans]
        self.num_tokens = sum(run.end - run.start for run in self.runs)

        def random(*shape: int) -> Tensor:
            values = torch.randn(*shape[:-1], shape[-1] * spread, generator=generator)
            return values.to(dtype).to(DEVICE)[..., ::spread]

        self.keys = random(len(ids) * page_size, num_kv_heads, dims[0])
        self.values = random(len(ids) * page_size, num_kv_heads, dims[1])
        used = np.concatenate([self.slots(RunTable(pages[index], 0, end)) for index, end in ends.items()])
        unused = np.setdiff1d(np.arange(len(self.keys)), used)
        self.keys[unused] = torch.nan
        self.values[unused] = torch.nan
        # As a model hands them over: [1, tokens, heads, dim] seen as [1, heads, tokens, dim].
        self.query = random(1, self.num_tokens, self.num_heads, dims[0]).transpose(1, 2)
        self.key = random(1, self.num_tokens, num_kv_heads, dims[0]).transpose(1, 2)
        self.value = random(1, self.num_tokens, num_kv_heads, dims[1]).transpose(1, 2)

    def slots(self, run: RunTable) -> np.ndarray:
        positions = np.arange(run.start, run.end)
        return np.asarray(run.pages)[positions // self.page_size] * self.page_size + positions % self.page_size

    def step(self) -> TritonStep:
        step = TritonBackend().prepare(self.runs, [self.keys], [self.values], self.page_size)
        assert isinstance(step, TritonStep)
        return step

    def tensors(self) -> list[Tensor]:
        return [self.query, self.key, self.value, self.keys, self.values]

    def expected(self, scale: float, sliding_window: int | None, **shaped: Any) -> tuple[Tensor, Tensor]:
        """The reference on what the caches hold now, in float32."""
        tensors = (self.query.float(), self.keys.float(), self.values.float())
        return paged_attention_reference(*tensors, self.runs, self.page_size, scale, sliding_window, **shaped)

    def in_working_dtype(self, scale: float, sliding_window: int | None) -> Tensor:
        """The same formula with scores, weights and sums rounded to the working dtype."""
        if self.query.dtype == torch.float32:
            return self.expected(scale, sliding_window)[0]
        out = torch.empty(1, self.num_tokens, self.num_heads, self.values.shape[2], device=DEVICE)
        group_size = self.num_heads // self.keys.shape[1]
        token = 0
        for run in self.runs:
            for position in range(run.start, run.end):
                first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
                slots = self.slots(RunTable(run.pages, first, position + 1))
                for head in range(self.num_heads):
                    key, value = self.keys[slots, head // group_size], self.values[slots, head // group_size]
                    weights = torch.softmax(key @ self.query[0, head, token] * scale, dim=0)
                    out[0, token, head] = weights @ value
                token += 1
        return out


def bits(tensor: Tensor) -> Tensor:
    """A copy that compares NaN bit by bit."""
    return tensor.contiguous().view(INT_VIEW[tensor.dtype]).clone()


def assert_matches(case: Case, sliding_window: int | None) -> None:
    scale = 0.3
    step = case.step()
    step.write(0, case.key, case.value)
    out, lse = step.attend(0, case.query, scale=scale, sliding_window=sliding_window)
    expected, expected_lse = case.expected(scale, sliding_window)
    plain = case.in_working_dtype(scale, sliding_window)
    assert out.dtype == case.query.dtype
    assert bool(out.isfinite().all())
    floor = FLOOR_ULPS[out.dtype] * torch.finfo(out.dtype).eps * float(expected.abs().max())
    allowed = 2 * float((plain - expected).abs().max()) + floor
    error = float((out.float() - expected).abs().max())
    assert error <= allowed, f"error {error}, allowed {allowed}"
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("few_keys")
@pytest.mark.parametrize(
    ("scenario", "sliding_window"),
    [*((scenario, window) for scenario in SCENARIOS for window in (None, 6)), ("split", 40)],
)
def test_scenarios(scenario: str, sliding_window: int | None) -> None:
    assert_matches(Case(SCENARIOS[scenario]), sliding_window)


@pytest.mark.usefixtures("few_keys")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scenario", ["middle", "split"])
def test_half_precision(scenario: str, dtype: torch.dtype) -> None:
    assert_matches(Case(SCENARIOS[scenario], dtype=dtype), None)


@pytest.mark.usefixtures("few_keys")
@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("scenario", "sliding_window"), [("lengths", 6), ("middle", None), ("split", None)])
def test_caps_and_sinks(scenario: str, sliding_window: int | None, sinks: bool, softcap: float | None) -> None:
    case = Case(SCENARIOS[scenario])
    logits = torch.tensor([-4.0, 0.0, 40.0], device=DEVICE) if sinks else None
    shaped = {"softcap": softcap, "sinks": logits}
    out = case.step()(0, case.query, case.key, case.value, scale=3.0, sliding_window=sliding_window, **shaped)
    torch.testing.assert_close(out, case.expected(3.0, sliding_window, **shaped)[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("heads", "dims"),
    [
        ((1, 1), (80, 96)),
        ((9, 3), (64, 64)),
        ((20, 1), (20, 12)),  # a group larger than a narrow tile
        ((2, 2), (1, 3)),
        ((2, 1), (128, 256)),
    ],
)
def test_heads_and_dimensions(heads: tuple[int, int], dims: tuple[int, int]) -> None:
    assert_matches(Case([(0, 1, 8), (1, 9, 10)], heads=heads, dims=dims), None)


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_page_sizes(page_size: int) -> None:
    assert_matches(Case(MIDDLE, page_size=page_size), 7)


def test_any_strides() -> None:
    assert_matches(Case(MIDDLE, spread=3), None)


def test_long_prefill_under_a_window_that_skips_blocks() -> None:
    assert_matches(Case([(0, 0, 160)], heads=(1, 1)), 20)


def test_a_group_larger_than_a_tile_is_split_at_the_real_limit() -> None:
    assert_matches(Case([(0, 1024, 1025), (1, 0, 2)], heads=(20, 1), dtype=torch.float16), None)


def test_a_window_wider_than_every_run_changes_nothing() -> None:
    case = Case(DECODE)
    step = case.step()
    results = [step(0, case.query, case.key, case.value, scale=0.3, sliding_window=window) for window in (None, 130)]
    assert torch.equal(results[0], results[1])


def test_a_window_of_one_returns_the_new_values() -> None:
    case = Case(DECODE)
    out = case.step()(0, case.query, case.key, case.value, scale=0.3, sliding_window=1)
    torch.testing.assert_close(out, case.value.transpose(1, 2).repeat_interleave(3, dim=2))


def test_equal_scores_average_the_positions() -> None:
    """Every value is its own position, every key zero: a query at p returns p / 2, whatever page was mixed up."""
    case = Case([(0, 0, 20), (1, 7, 16), (2, 40, 41)], heads=(2, 2))
    for run in case.runs:
        slots = case.slots(RunTable(run.pages, 0, run.end))
        case.keys[slots] = 0
        case.values[slots] = torch.arange(run.end, dtype=torch.float32, device=DEVICE)[:, None, None]
    positions = torch.cat([torch.arange(run.start, run.end, dtype=torch.float32) for run in case.runs]).to(DEVICE)
    value = positions[None, None, :, None].expand(1, 2, -1, 16)
    out = case.step()(0, case.query, torch.zeros_like(case.key), value, scale=1.0, sliding_window=None)
    torch.testing.assert_close(out, (positions / 2)[None, :, None, None].expand_as(out))


@pytest.mark.parametrize("dtype", list(INT_VIEW))
def test_write_moves_bits_and_touches_nothing_else(dtype: torch.dtype) -> None:
    case = Case(MIDDLE, dims=(20, 12), dtype=dtype)
    keys, values = bits(case.keys), bits(case.values)
    slots = np.concatenate([case.slots(run) for run in case.runs])
    keys[slots] = bits(case.key[0].transpose(0, 1))
    values[slots] = bits(case.value[0].transpose(0, 1))
    before = [bits(tensor) for tensor in (case.query, case.key, case.value)]
    case.step()(0, case.query, case.key, case.value, scale=0.3, sliding_window=None)
    assert torch.equal(bits(case.keys), keys)
    assert torch.equal(bits(case.values), values)
    for tensor, copy in zip((case.query, case.key, case.value), before, strict=True):
        assert torch.equal(bits(tensor), copy)


@pytest.mark.usefixtures("few_keys")
def test_two_passes_are_equal() -> None:
    case = Case(SPLIT)
    first, second = (case.step()(0, case.query, case.key, case.value, scale=0.3, sliding_window=None) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.usefixtures("few_keys")
def test_a_decoded_token_does_not_depend_on_its_neighbours() -> None:
    case = Case(SPLIT)
    together = case.step()(0, case.query, case.key, case.value, scale=0.3, sliding_window=None)
    case.runs = case.runs[:1]
    alone, _ = case.step().attend(0, case.query[:, :, :1], scale=0.3, sliding_window=None)
    assert torch.equal(together[:, :1], alone)


def test_layers_may_differ_in_heads_and_dimensions() -> None:
    """One step over two layers; each equals a step over that layer alone."""
    cases = [Case(DECODE, heads=(6, 2)), Case(DECODE, heads=(4, 4), dims=(24, 8))]
    keys, values = [case.keys for case in cases], [case.values for case in cases]
    step = TritonBackend().prepare(cases[0].runs, keys, values, 4)
    for layer_id, case in enumerate(cases):
        out = step(layer_id, case.query, case.key, case.value, scale=0.3, sliding_window=None)
        torch.testing.assert_close(out, case.expected(0.3, None)[0])


def test_refuses_tensors_that_do_not_fit() -> None:
    case = Case(DECODE)
    step = case.step()
    with pytest.raises(ValueError, match=re.escape("key must be (1, 1, 4, 16) torch.float32, got (1, 1, 3, 16)")):
        step(0, case.query, case.key[:, :, 1:], case.value, scale=1.0, sliding_window=None)
    with pytest.raises(ValueError, match=r"value must be .* torch.float32, got .* torch.float16"):
        step(0, case.query, case.key, case.value.half(), scale=1.0, sliding_window=None)
    with pytest.raises(ValueError, match=re.escape("a multiple of 1, 4, 16] torch.float32, got (1, 3, 3, 16)")):
        step(0, case.query[:, :, 1:], case.key, case.value, scale=1.0, sliding_window=None)
    with pytest.raises(ValueError, match="sliding_window must be at least 1 or None, got 0"):
        step(0, case.query, case.key, case.value, scale=1.0, sliding_window=0)


def test_refuses_dtypes_it_does_not_compute_in() -> None:
    case = Case(DECODE)
    with pytest.raises(InvalidRequest, match=r"not in torch\.float64"):
        TritonBackend().prepare(case.runs, [case.keys.double()], [case.values.double()], 4)
