"""The runner against the stock forward of every family, in float32: whatever the runs, the pages and the batch.

Every slot that no sequence uses is NaN, so a read from the wrong place is loud, and is compared bit by bit afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvcomm.memory import renditions, tree
from kvcomm.model import linear, runner
from kvcomm.model.attention.contract import AttentionStep, RunTable
from kvcomm.model.attention.torch_backend import TorchBackend
from kvcomm.model.families import random_model
from kvcomm.model.geometry import ModelGeometry
from kvcomm.model.runner import ModelRunner, Run
from tests.limits import PATIENCE_S
from tests.model.architectures import FAMILIES, tiny_model

if TYPE_CHECKING:
    from kvcomm.model.loading import LoadedModel

PAGE_SIZE = 8
NUM_PAGES = 96
TOLERANCE = 1e-4
"""Largest difference of float32 logits that are spread by about 1."""

Ids = np.ndarray
WINDOWLESS = sorted(name for name, family in FAMILIES.items() if set(family.windows) == {None})

every_family = pytest.mark.parametrize("family", sorted(FAMILIES))


class Paged:
    """A model with storages full of NaN, and what was written to them."""

    def __init__(self, model: PreTrainedModel) -> None:
        layers = measured(model).layers
        num_slots = NUM_PAGES * PAGE_SIZE
        self.keys = [torch.full((num_slots, layer.num_kv_heads, layer.key_dim), torch.nan) for layer in layers]
        self.values = [torch.full((num_slots, layer.num_kv_heads, layer.value_dim), torch.nan) for layer in layers]
        self.runner = ModelRunner(
            model, keys=self.keys, values=self.values, page_size=PAGE_SIZE, backend=TorchBackend()
        )

    def forward(self, *runs: Run) -> list[Tensor]:
        """Logits of each run. Every slot outside the runs must keep its bits."""
        before = [tensor.clone() for tensor in (*self.keys, *self.values)]
        logits = self.runner.forward(runs)
        written = np.concatenate([slots_of(run.pages, run.start, run.end) for run in runs])
        for tensor, old in zip((*self.keys, *self.values), before, strict=True):
            assert bool(tensor[written].isfinite().all())
            old[written] = tensor[written]
            assert torch.equal(tensor.view(torch.int32), old.view(torch.int32))
        return list(logits.split([run.num_logits for run in runs]))

    def poison(self, pages: Ids, start: int, end: int) -> None:
        for tensor in (*self.keys, *self.values):
            tensor[slots_of(pages, start, end)] = torch.nan


@cache
def measured(model: PreTrainedModel) -> ModelGeometry:
    return ModelGeometry.from_model(model)


def slots_of(pages: Ids, start: int, end: int) -> Ids:
    positions = np.arange(start, end)
    return pages[positions // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + positions % PAGE_SIZE


def whole(token_ids: Ids, pages: Ids) -> Run:
    """A run over the whole sequence, with all its logits."""
    return Run(token_ids, pages, 0, len(token_ids))


def part(token_ids: Ids, pages: Ids, start: int, end: int) -> Run:
    return Run(token_ids[start:end], pages, start, end - start)


def some_tokens(num_tokens: int, *, seed: int = 0, vocab_size: int = 97) -> Ids:
    return np.random.default_rng(seed).integers(3, vocab_size, num_tokens).astype(np.int32)


def tables(*lengths: int, scattered: bool = True) -> list[Ids]:
    ids = np.random.default_rng(0).permutation(NUM_PAGES) if scattered else np.arange(5, NUM_PAGES)
    ends = np.cumsum([-(-length // PAGE_SIZE) for length in lengths])
    return [pages.astype(np.int32) for pages in np.split(ids, ends)[:-1]]


def stock(model: PreTrainedModel, token_ids: Ids) -> Tensor:
    """[num_tokens, vocab_size] by the model's own forward."""
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(token_ids.astype(np.int64))[None], use_cache=False).logits[0]
    assert isinstance(logits, Tensor)
    return logits


def require_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    return tiny_model(family)


@every_family
def test_every_visible_token_matters(model: PreTrainedModel, family: str) -> None:
    """The other tests mean nothing if a wrongly hidden or shown token changes less than their tolerance."""
    token_ids = some_tokens(60)
    logits = stock(model, token_ids)
    assert 0.5 < float(logits.std()) < 2
    for position in (38, 50, 58):
        changed = token_ids.copy()
        changed[position] = changed[position] % 90 + 5
        assert float((stock(model, changed)[-1] - logits[-1]).abs().max()) > 100 * TOLERANCE, position


@every_family
@pytest.mark.parametrize("scattered", [False, True])
def test_full_prefill(model: PreTrainedModel, family: str, scattered: bool) -> None:
    (pages,) = tables(100, scattered=scattered)
    token_ids = some_tokens(100)
    (logits,) = Paged(model).forward(whole(token_ids, pages))
    require_close(logits, stock(model, token_ids))


@pytest.mark.parametrize("family", WINDOWLESS)
@pytest.mark.parametrize("scattered", [False, True])
def test_full_prefill_without_windows_is_bit_identical(model: PreTrainedModel, family: str, scattered: bool) -> None:
    """100 tokens: short passes use another product in the linear layers, equal but for rounding."""
    (pages,) = tables(100, scattered=scattered)
    token_ids = some_tokens(100)
    (logits,) = Paged(model).forward(whole(token_ids, pages))
    assert torch.equal(logits, stock(model, token_ids))


@every_family
@pytest.mark.parametrize("scattered", [False, True])
def test_chunked_prefill_and_decode(model: PreTrainedModel, family: str, scattered: bool) -> None:
    """Chunks that end before, at and behind page ends and the window, then single tokens."""
    (pages,) = tables(100, scattered=scattered)
    token_ids = some_tokens(100)
    paged = Paged(model)
    cuts = [0, 1, 7, 8, 17, 41, 90, *range(91, 101)]
    chunks = [part(token_ids, pages, start, end) for start, end in pairwise(cuts)]
    require_close(torch.cat([paged.forward(chunk)[0] for chunk in chunks]), stock(model, token_ids))


@every_family
@pytest.mark.parametrize("scattered", [False, True])
def test_ragged_batches(model: PreTrainedModel, family: str, scattered: bool) -> None:
    """Sequences of every awkward length prefilled together, then continued together by different amounts."""
    first, last = (1, 7, 8, 9, 63, 100), (2, 30, 9, 10, 64, 140)
    pages = tables(*last, scattered=scattered)
    token_ids = [some_tokens(length, seed=seed) for seed, length in enumerate(last)]
    paged = Paged(model)
    begun = paged.forward(*(part(ids, table, 0, end) for ids, table, end in zip(token_ids, pages, first, strict=True)))
    grown = [
        part(ids, table, start, end)
        for ids, table, start, end in zip(token_ids, pages, first, last, strict=True)
        if end > start
    ]
    continued = iter(paged.forward(*reversed(grown))[::-1])
    for ids, head, start, end in zip(token_ids, begun, first, last, strict=True):
        got = torch.cat([head, next(continued)]) if end > start else head
        require_close(got, stock(model, ids))


@every_family
def test_recomputation_in_the_middle(model: PreTrainedModel, family: str) -> None:
    """Three holes of one sequence are computed in one pass; later ones need what the earlier ones write."""
    (pages,) = tables(120)
    token_ids = some_tokens(120)
    paged = Paged(model)
    paged.forward(whole(token_ids, pages))
    slots = slots_of(pages, 0, 120)
    before = [tensor[slots] for tensor in (*paged.keys, *paged.values)]
    holes = [(5, 9), (20, 61), (119, 120)]
    for start, end in holes:
        paged.poison(pages, start, end)
    got = paged.forward(*(part(token_ids, pages, start, end) for start, end in reversed(holes)))
    expected = stock(model, token_ids)
    for (start, end), logits in zip(reversed(holes), got, strict=True):
        require_close(logits, expected[start:end])
    for tensor, old in zip((*paged.keys, *paged.values), before, strict=True):
        torch.testing.assert_close(tensor[slots], old, rtol=1e-4, atol=1e-4)


@every_family
@pytest.mark.parametrize("num_new", [1, 3])
def test_nested_forks_share_pages(model: PreTrainedModel, family: str, num_new: int) -> None:
    """Three levels: a root, two branches, five leaves; the leaves are computed together."""
    ids = np.random.default_rng(3).permutation(NUM_PAGES).astype(np.int32)
    root, left, right, *tails = np.split(ids[:46], [9, 19, 31, 34, 37, 40, 43])
    paths = [(left, 0), (right, 1), (left, 0), (right, 1), (right, 1)]
    root_tokens, branch_tokens = some_tokens(72), [some_tokens(80, seed=1), some_tokens(96, seed=2)]
    paged = Paged(model)
    for branch, tokens in zip((left, right), branch_tokens, strict=True):
        paged.forward(whole(np.concatenate([root_tokens, tokens]), np.concatenate([root, branch])))
    runs, expected = [], []
    for leaf, ((branch, index), tail) in enumerate(zip(paths, tails, strict=True)):
        prefix = np.concatenate([root_tokens, branch_tokens[index]])
        leaf_tokens = np.concatenate([prefix, some_tokens(4 * leaf + 8, seed=10 + leaf)])
        pages = np.concatenate([root, branch, tail])
        end = len(leaf_tokens)
        paged.forward(part(leaf_tokens, pages, len(prefix), end - num_new))
        runs.append(part(leaf_tokens, pages, end - num_new, end))
        expected.append(stock(model, leaf_tokens)[-num_new:])
    for logits, truth in zip(paged.forward(*runs), expected, strict=True):
        require_close(logits, truth)


def test_only_the_wanted_logits_are_returned_in_the_order_of_the_runs() -> None:
    model = tiny_model("llama")
    first, second, third = tables(20, 9, 12)
    tokens = [some_tokens(length, seed=length) for length in (20, 9, 12)]
    paged = Paged(model)
    logits = paged.runner.forward([Run(tokens[0], first, 0, 2), Run(tokens[1], second, 0, 0), Run(tokens[2], third, 0)])
    expected = torch.cat([stock(model, tokens[0])[-2:], stock(model, tokens[2])[-1:]])
    require_close(logits, expected)
    assert paged.runner.forward([Run(tokens[1], second, 0, 0)]).shape == (0, 97)


def test_a_model_that_returns_all_logits_is_cut_to_the_wanted_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: some old models do not know `logits_to_keep`; their rows were taken for those of other runs."""
    model = random_model(FAMILIES["llama"].config())
    forward = model.forward

    def all_logits(*, logits_to_keep: Tensor, **keywords: object) -> object:
        return forward(**keywords)

    first, second = tables(20, 9)
    tokens = [some_tokens(length, seed=length) for length in (20, 9)]
    expected = torch.cat([stock(model, tokens[0])[-2:], stock(model, tokens[1])[-1:]])
    paged = Paged(model)
    monkeypatch.setattr(model, "forward", all_logits)
    require_close(paged.runner.forward([Run(tokens[0], first, 0, 2), Run(tokens[1], second, 0)]), expected)


@pytest.mark.parametrize(("start", "num_runs", "is_free"), [(0, 1, False), (8, 1, True), (0, 2, True)])
def test_only_a_prompt_computed_whole_must_be_stock_to_the_last_bit(
    start: int, num_runs: int, is_free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rounding may differ, products of many rows are those that were chosen."""
    seen: list[int] = []

    def watched(name: str, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(len(rows))
        return linear.PRODUCTS[name](rows, weight, bias)

    monkeypatch.setattr(linear, "product", watched)
    model = tiny_model("llama")
    paged = Paged(model)
    token_ids, pages = some_tokens(100), tables(*[100] * num_runs)
    if start:
        paged.forward(part(token_ids, pages[0], 0, start))
    seen.clear()
    every = paged.forward(*(part(token_ids, each, start, 100) for each in pages))
    assert bool(seen) == is_free
    for logits in every:
        require_close(logits, stock(model, token_ids)[start:])


def test_two_passes_over_the_same_runs_are_equal() -> None:
    first, second = tables(30, 50)
    runs = [whole(some_tokens(30), first), whole(some_tokens(50, seed=1), second)]
    paged = Paged(tiny_model("gemma3"))
    assert torch.equal(paged.runner.forward(runs), paged.runner.forward(runs))


class BrokenStep:
    """An attention step that fails in the second layer."""

    def __call__(self, layer_id: int, query: Tensor, *_: Tensor, **__: object) -> Tensor:
        if layer_id:
            raise RuntimeError("no memory for the second layer")
        return torch.zeros_like(query).transpose(1, 2)


class BrokenBackend:
    name = "broken"

    def prepare(self, *_: object) -> BrokenStep:
        return BrokenStep()


def generated(model: PreTrainedModel) -> list[int]:
    prompt = torch.from_numpy(some_tokens(30, seed=9).astype(np.int64))[None]
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    tokens = out[0].tolist()
    assert isinstance(tokens, list)
    return tokens


class WaitingBackend(TorchBackend):
    """Says when it has been called for the first layer, then waits there a while for something else to happen."""

    def __init__(self, *, announce: threading.Event, wait_for: threading.Event) -> None:
        super().__init__()
        self._wait_for, self._announce = wait_for, announce

    def prepare(
        self, runs: Sequence[RunTable], keys: Sequence[Tensor], values: Sequence[Tensor], page_size: int
    ) -> AttentionStep:
        step = super().prepare(runs, keys, values, page_size)

        def waiting(layer_id: int, *operands: Tensor, **keywords: Any) -> Tensor:
            if layer_id == 0:
                self._announce.set()
                self._wait_for.wait(0.5)
            return step(layer_id, *operands, **keywords)

        return waiting


@pytest.fixture
def fresh_model() -> PreTrainedModel:
    """A model of the test's own, because these tests are about what a pass leaves behind in it."""
    return random_model(FAMILIES["gemma3"].config())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_still_generates_as_before(fresh_model: PreTrainedModel, implementation: str) -> None:
    fresh_model.set_attn_implementation(implementation)
    before, logits = generated(fresh_model), stock(fresh_model, some_tokens(40))
    (pages,) = tables(40)
    paged = Paged(fresh_model)
    assert fresh_model.config._attn_implementation == implementation
    (got,) = paged.forward(whole(some_tokens(40), pages))
    assert fresh_model.config._attn_implementation == implementation
    assert torch.equal(stock(fresh_model, some_tokens(40)), logits)
    assert generated(fresh_model) == before
    require_close(got, logits)


def test_the_model_still_generates_as_before_after_a_pass_that_failed(fresh_model: PreTrainedModel) -> None:
    before = generated(fresh_model)
    paged = Paged(fresh_model)
    broken = ModelRunner(
        fresh_model, keys=paged.keys, values=paged.values, page_size=PAGE_SIZE, backend=BrokenBackend()
    )
    (pages,) = tables(40)
    with pytest.raises(RuntimeError, match="no memory for the second layer"):
        broken.forward([whole(some_tokens(40), pages)])
    assert fresh_model.config._attn_implementation == "sdpa"
    assert generated(fresh_model) == before
    require_close(paged.forward(whole(some_tokens(40), pages))[0], stock(fresh_model, some_tokens(40)))


def test_two_runners_on_one_model_take_turns(fresh_model: PreTrainedModel) -> None:
    """Bug: the first pass to end switched the model back to stock attention while the other was in its layers."""
    first_is_inside, second_is_inside, first_has_left = (threading.Event() for _ in range(3))
    first, second = Paged(fresh_model), Paged(fresh_model)
    first.runner.backend = WaitingBackend(announce=first_is_inside, wait_for=second_is_inside)
    second.runner.backend = WaitingBackend(announce=second_is_inside, wait_for=first_has_left)
    (pages,) = tables(40)
    run = whole(some_tokens(40), pages)

    def first_pass() -> list[Tensor]:
        logits = first.forward(run)
        first_has_left.set()
        return logits

    with ThreadPoolExecutor(2) as pool:
        passes = [pool.submit(first_pass)]
        assert first_is_inside.wait(PATIENCE_S)
        passes.append(pool.submit(second.forward, run))
        logits = [future.result()[0] for future in passes]
    assert fresh_model.config._attn_implementation == "sdpa"
    for got in logits:
        require_close(got, stock(fresh_model, some_tokens(40)))


def test_a_runner_leaves_the_model_alone(fresh_model: PreTrainedModel) -> None:
    """Weights, buffers and mode are the user's."""
    before = {name: tensor.clone() for name, tensor in (*fresh_model.named_parameters(), *fresh_model.named_buffers())}
    (pages,) = tables(40)
    Paged(fresh_model).forward(whole(some_tokens(40), pages))
    after = dict((*fresh_model.named_parameters(), *fresh_model.named_buffers()))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not fresh_model.training


def real_sequences(tokenizer: PreTrainedTokenizerBase, num: int) -> list[Ids]:
    """Sequences of prose, 20 tokens and more; the first 64 of the last two are the same.

    Prose, because random token ids drive the real model to logits of 27, where float32 itself is wrong by 7e-5: against
    a float64 forward the stock forward was further off (7.1e-5) than runs were (5.6e-5), and both together by 1.02e-4.
    """
    prose = np.array(tokenizer.encode(f"{runner.__doc__} {tree.__doc__} {renditions.__doc__}"), dtype=np.int32)
    ids = [prose[40 * index + 64 :][: 20 + 3 * index] for index in range(num)]
    return [*ids[:-2], *(np.concatenate([prose[:64], tail]) for tail in ids[-2:])]


def test_the_real_model(smollm2: LoadedModel) -> None:
    """Bit-identical alone; ragged, chunked, forked and decoded within the tolerance."""
    model = smollm2.model
    paged = Paged(model)
    lone = some_tokens(70, vocab_size=49000)
    lone_pages, first, second, third, tail = tables(70, 40, 40, 100, 40)
    (logits,) = paged.forward(whole(lone, lone_pages))
    assert torch.equal(logits, stock(model, lone))
    tokens = real_sequences(smollm2.tokenizer, 4)
    pages = [first, second, third, np.concatenate([third[:8], tail])]
    paged.forward(*(part(tokens[i], pages[i], 0, len(tokens[i]) - 9) for i in (0, 1, 2)))
    paged.forward(part(tokens[3], pages[3], 64, len(tokens[3]) - 9))
    chunk = [part(ids, table, len(ids) - 9, len(ids) - 1) for ids, table in zip(tokens, pages, strict=True)]
    step = [part(ids, table, len(ids) - 1, len(ids)) for ids, table in zip(tokens, pages, strict=True)]
    heads, tails = paged.forward(*chunk), paged.forward(*step)
    for ids, head, last in zip(tokens, heads, tails, strict=True):
        require_close(torch.cat([head, last]), stock(model, ids)[-9:])
