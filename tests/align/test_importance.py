"""Importance: heads that tell what an answer reads come to count, the others do not."""

from __future__ import annotations

import pytest
import torch

from kvcomm.align.importance import EPOCHS, HeadFit, importance

NUM_HEADS = 6
TELLING = 4


def prompt(seed: int, num_tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of six heads, one of which looks where the answer will; and where that is."""
    generator = torch.Generator().manual_seed(seed)
    attended = torch.rand(num_tokens, generator=generator).pow(4)
    attention = torch.rand(NUM_HEADS, num_tokens, generator=generator).pow(4)
    attention[TELLING] = 0.3 * attended
    return attention, attended


def fitted(num_prompts: int) -> HeadFit:
    fit = HeadFit()
    for seed in range(num_prompts):
        fit.add(*prompt(seed))
    return fit


def test_telling_heads_come_to_count() -> None:
    weights = fitted(EPOCHS[0]).weights
    assert weights is not None
    assert max(range(NUM_HEADS), key=lambda head: weights[head]) == TELLING
    attention, attended = prompt(99)
    errors = torch.ones(len(attended))
    wanted = set(attended.topk(50).indices.tolist())
    learned = set(importance(attention, errors, weights).topk(50).indices.tolist())
    alike = set(importance(attention, errors, None).topk(50).indices.tolist())
    assert len(wanted & learned) >= 48
    assert len(wanted & alike) < 40


def test_the_weights_are_those_of_ridge_regression() -> None:
    """Against least squares on the data with the penalty as further rows."""
    fit = fitted(EPOCHS[0])
    rows, targets = [], []
    for seed in range(EPOCHS[0]):
        attention, attended = prompt(seed)
        rows.append((attention / attention.sum(1, keepdim=True) * 200).sqrt().T)
        targets.append((attended / attended.sum() * 200).sqrt())
    x, y = torch.cat(rows).double(), torch.cat(targets).double()
    penalty = (0.03 * x.square().sum(0).mean()).sqrt() * torch.eye(NUM_HEADS, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat((x, penalty)), torch.cat((y, y.new_zeros(NUM_HEADS)))).solution
    torch.testing.assert_close(torch.tensor(fit.weights, dtype=torch.float64), expected, atol=1e-5, rtol=1e-5)


def test_few_prompts_tell_nothing() -> None:
    assert fitted(EPOCHS[0] - 1).weights is None
    assert HeadFit().weights is None


def test_weights_change_at_the_ends_of_epochs_only() -> None:
    fit = HeadFit()
    changed = []
    for count in range(1, EPOCHS[-1] + 20):
        before = fit.weights
        fit.add(*prompt(count))
        changed += [count] * (fit.weights != before)
        assert fit.is_learning == (count < EPOCHS[-1])
    assert changed == list(EPOCHS)
    assert fit.num_prompts == EPOCHS[-1]


def test_weights_that_come_with_a_model_stay() -> None:
    fit = HeadFit((0.5,) * NUM_HEADS)
    for seed in range(EPOCHS[0]):
        fit.add(*prompt(seed))
    assert fit.weights == (0.5,) * NUM_HEADS
    assert not fit.is_learning
    assert fit.num_prompts == 0


def test_a_prompt_with_numbers_that_are_none_does_not_count() -> None:
    fit = fitted(EPOCHS[0] - 1)
    attention, attended = prompt(50)
    fit.add(attention.index_fill(1, torch.tensor([3]), float("nan")), attended)
    fit.add(attention, attended.index_fill(0, torch.tensor([3]), float("inf")))
    assert fit.weights is None
    fit.add(*prompt(EPOCHS[0] - 1))
    assert fit.weights == fitted(EPOCHS[0]).weights


def test_prompts_that_look_nowhere_tell_nothing() -> None:
    fit = HeadFit()
    for _ in range(EPOCHS[0]):
        fit.add(torch.zeros(NUM_HEADS, 5), torch.zeros(5))
    assert fit.weights == (0.0,) * NUM_HEADS


@pytest.mark.parametrize("weights", [None, (0.0, 0.0, 0.0, 0.0, 1.0, 0.0)])
def test_tokens_far_off_are_worth_more(weights: tuple[float, ...] | None) -> None:
    attention, _ = prompt(3)
    errors = torch.linspace(1, 3, 200)
    scores = importance(attention, errors, weights)
    torch.testing.assert_close(scores, importance(attention, torch.ones(200), weights) * errors)


def test_heads_that_look_nowhere_do_no_harm() -> None:
    attention, _ = prompt(3)
    attention[1] = 0
    assert importance(attention, torch.ones(200), None).isfinite().all()
    assert importance(attention, torch.ones(200), (0.1,) * NUM_HEADS).isfinite().all()
