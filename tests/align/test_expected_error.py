"""Expected errors of anchors, against a loop that estimates every anchor from the other texts."""

from __future__ import annotations

import math

import pytest
import torch

from kvcomm.align.bank import AnchorBank, BankShape, BankSnapshot
from kvcomm.align.edges import Edge
from kvcomm.align.expected_error import anchor_errors, neighbor_weights
from kvcomm.align.offsets import OffsetRows, OffsetTable

SHAPE = BankShape((None, 6, 6, 6), (None, 4, 4, 4), 2, 5)
LAYERS = range(1, 3)


def bank(num_texts: int, num_tokens: int = 5) -> BankSnapshot:
    generator = torch.Generator().manual_seed(num_texts)
    made = AnchorBank(Edge("s", "t", "question", "question"), SHAPE)

    def rows(channels: int) -> tuple[OffsetRows | None, ...]:
        found = [OffsetRows.quantize(torch.randn(num_tokens, channels, generator=generator)) for _ in range(3)]
        return (None, *found)

    for _ in range(num_texts):
        made.learn(torch.randn(2, num_tokens, 5, generator=generator), OffsetTable(rows(6), rows(4)))
    return made.snapshot()


def expected(snapshot: BankSnapshot, token: int, k: int, alpha: float) -> float:
    sketches = snapshot.sketches[1]
    others = [other for other in range(snapshot.num_tokens) if snapshot.texts[other] != snapshot.texts[token]]
    distances = sorted((float((sketches[token] - sketches[other]).norm()), other) for other in others)[:k]
    mean = sum(distance for distance, _ in distances) / len(distances) if distances else 1.0
    weights = [math.exp(-4.0 * distance / mean) for distance, _ in distances]
    total = 0.0
    for layer in LAYERS:
        rows = snapshot.offsets.keys[layer]
        assert rows is not None
        offsets = rows.dequantize()
        estimate = torch.zeros(6)
        for weight, (_, other) in zip(weights, distances, strict=True):
            estimate += alpha * weight / sum(weights) * offsets[other]
        total += float((offsets[token] - estimate).square().sum())
    return math.sqrt(total)


@pytest.mark.parametrize("num_texts", [1, 2, 70])
@pytest.mark.parametrize("alpha", [0.0, 0.75])
def test_errors_are_those_of_estimates_from_other_texts(num_texts: int, alpha: float) -> None:
    snapshot = bank(num_texts)
    found = anchor_errors(snapshot, LAYERS, 1, k=8, alpha=alpha, temperature=4.0)
    assert len(found) == snapshot.num_tokens == 5 * num_texts
    for token in range(0, snapshot.num_tokens, 7):
        assert float(found[token]) == pytest.approx(expected(snapshot, token, 8, alpha), rel=1e-4)


def test_of_an_empty_bank_nothing_is_known() -> None:
    assert len(anchor_errors(bank(0), LAYERS, 1, k=8, alpha=1.0, temperature=4.0)) == 0


def test_weights_sum_to_one_and_the_nearest_counts_most() -> None:
    weights = neighbor_weights(torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0], [3.0, math.inf, math.inf]]), 4.0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3))
    assert weights[0, 0] > weights[0, 1] > weights[0, 2] > 0
    torch.testing.assert_close(weights[1], torch.full((3,), 1 / 3))
    assert weights[2].tolist() == [1.0, 0.0, 0.0]
