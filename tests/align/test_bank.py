"""Banks: what they keep, against a naive model; snapshots that never change; tenants apart."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcomm.align.bank import MIN_NOVELTY, AnchorBank, AnchorStore, BankShape
from kvcomm.align.edges import Edge
from kvcomm.align.offsets import OffsetRows, OffsetTable
from kvcomm.errors import InvalidRequest
from tests.limits import threads

SHAPE = BankShape((None, 6), (None, 4), 2, 5)
EDGE = Edge("aa", "bb", "question", "text")


def text(num_tokens: int, seed: int) -> tuple[Tensor, OffsetTable]:
    """Sketches and offsets of one text; the first code of a key row tells the token."""
    generator = torch.Generator().manual_seed(seed)
    keys = OffsetRows.quantize(torch.randn(num_tokens, 6, generator=generator))
    values = OffsetRows.quantize(torch.randn(num_tokens, 4, generator=generator))
    return torch.randn(2, num_tokens, 5, generator=generator), OffsetTable((None, keys), (None, values))


def naive_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over groups of the distance of two tokens' sketches, relative to the first one's norm."""
    return float(np.mean([np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(one, other, strict=True)]))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 4)), min_size=1, max_size=5))
def test_what_is_new_enters_and_what_is_known_does_not(texts: list[tuple[int, int]]) -> None:
    bank, known = AnchorBank(EDGE, SHAPE), []
    for num_tokens, seed in texts:
        sketches, offsets = text(num_tokens, seed)
        fresh = 0
        for token in range(num_tokens):
            one = sketches[:, token].numpy()
            if all(naive_distance(one, other) > MIN_NOVELTY for other in known):
                known.append(one)
                fresh += 1
        assert bank.learn(sketches, offsets) == fresh
        bank.check_integrity()
    assert np.allclose(bank.snapshot().sketches.numpy(), np.stack(known, axis=1))


def test_over_the_cap_the_most_redundant_go() -> None:
    bank = AnchorBank(EDGE, SHAPE, max_bytes=8 * SHAPE.token_bytes)
    sketches, offsets = text(14, 1)
    kept = list(range(14))
    while len(kept) > 8:
        pairs = [
            (naive_distance(sketches[:, a].numpy(), sketches[:, b].numpy()), a, b) for a in kept for b in kept if a != b
        ]
        _, one, other = min(pairs)
        kept.remove(min(one, other))
    bank.learn(sketches, offsets)
    assert torch.equal(bank.snapshot().sketches, sketches[:, kept])
    codes = bank.snapshot().offsets.keys[1]
    assert codes is not None
    expected = offsets.take(torch.tensor(kept)).keys[1]
    assert expected is not None
    assert torch.equal(codes.codes, expected.codes)


def test_a_snapshot_never_changes() -> None:
    bank = AnchorBank(EDGE, SHAPE)
    bank.learn(*text(5, 1))
    held = bank.snapshot()
    before = held.sketches.clone()
    bank.learn(*text(9, 2))
    assert torch.equal(held.sketches, before)
    assert (held.num_tokens, bank.snapshot().num_tokens) == (5, 14)
    assert bank.snapshot().version > held.version


def test_the_nearest_are_found_group_by_group() -> None:
    bank = AnchorBank(EDGE, SHAPE)
    bank.learn(*text(20, 1))
    queries, _ = text(6, 2)
    distances, indices = bank.snapshot().nearest(queries, 4)
    for group in range(2):
        every = np.linalg.norm(queries[group].numpy()[:, None] - bank.snapshot().sketches[group].numpy()[None], axis=-1)
        assert np.array_equal(indices[group].numpy(), np.argsort(every, axis=1)[:, :4])
        assert np.allclose(distances[group].numpy(), np.sort(every, axis=1)[:, :4], atol=1e-6)
    assert bank.snapshot().nearest(queries, 99)[0].shape == (2, 6, 20)


def test_smollm2_needs_less_than_12_kb_a_token() -> None:
    channels = (None, *([192] * 29))
    offsets = OffsetTable(
        tuple(None if size is None else OffsetRows.quantize(torch.randn(3, size)) for size in channels),
        tuple(None if size is None else OffsetRows.quantize(torch.randn(3, size)) for size in channels),
    )
    assert offsets.num_bytes / 3 <= 12_000
    assert (
        BankShape(channels, channels, 1, 1).token_bytes == offsets.num_bytes / 3 + 4 + 4
    )  # a sketch of one entry, its text


@pytest.mark.parametrize("what", ["shape", "channels", "nan", "scales"])
def test_bad_anchors_are_refused_and_change_nothing(what: str) -> None:
    bank = AnchorBank(EDGE, SHAPE)
    bank.learn(*text(5, 1))
    sketches, offsets = text(4, 2)
    if what == "shape":
        sketches = sketches[:1]
    elif what == "channels":
        offsets = OffsetTable(offsets.values, offsets.keys)
    elif what == "nan":
        sketches[0, 1, 2] = torch.nan
    else:
        assert offsets.keys[1] is not None
        offsets.keys[1].scales[0] = torch.inf
    with pytest.raises(InvalidRequest):
        bank.learn(sketches, offsets)
    assert bank.snapshot().num_tokens == 5


def test_threads_may_learn_while_others_look() -> None:
    bank = AnchorBank(EDGE, SHAPE, max_bytes=40 * SHAPE.token_bytes)
    broken: list[str] = []

    def look() -> None:
        for _ in range(200):
            snapshot = bank.snapshot()
            if snapshot.offsets.num_tokens != snapshot.num_tokens:
                broken.append("torn")

    def learn(first: int) -> None:
        for index in range(10):
            bank.learn(*text(7, first + index))

    with threads(look, look, partial(learn, 0), partial(learn, 100)):
        pass
    assert not broken
    assert bank.snapshot().num_tokens == 40
    bank.check_integrity()


def test_a_young_edge_falls_back_to_its_slots_and_never_to_another_tenant() -> None:
    store = AnchorStore(SHAPE)
    assert store.find("one", EDGE, 1) is None
    store.bank("one", EDGE.general).learn(*text(30, 1))
    store.bank("one", EDGE).learn(*text(5, 2))
    young, old = store.find("one", EDGE, 10), store.find("one", EDGE, 5)
    assert young is not None
    assert old is not None
    assert (young.edge.is_general, old.edge.is_general) == (True, False)
    assert store.find("two", EDGE, 1) is None
    store.check_integrity()
    store.forget("one")
    assert store.find("one", EDGE, 1) is None
