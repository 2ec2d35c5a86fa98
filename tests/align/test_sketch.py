"""Sketches: what makes two tokens alike, and that nothing is sketched twice."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from kvcomm.align.edges import Edge
from kvcomm.align.moves import Move
from kvcomm.align.ops.contract import LayerStore, Place
from kvcomm.align.repeats import Surroundings
from kvcomm.align.sketch import Sketcher
from kvcomm.align.spans import layer_stores
from kvcomm.engine.engine import Engine
from kvcomm.memory.sequences import Identity
from kvcomm.model.rope import rotate
from tests.tiny import tiny_model


def move(source: Place, index: int = 0, unseen: tuple[tuple[int, ...], ...] = ()) -> Move:
    """Of a segment of the tokens 3, 4, 5 and so on."""
    nothing, edge = np.empty(0, dtype=np.int32), Edge("a", "b", "text", "text")
    around = Surroundings(range(3, 3 + index + source.num_tokens), unseen=unseen)
    return Move(edge, 100 + index, 100 + index + source.num_tokens, index, source, nothing, around)


@pytest.fixture(scope="module")
def sketcher() -> Sketcher:
    tiny = tiny_model()
    with Engine(tiny.model, tiny.tokenizer) as engine:
        return Sketcher(engine.geometry)


@pytest.fixture
def layers() -> list[LayerStore]:
    tiny = tiny_model()
    with Engine(tiny.model, tiny.tokenizer) as engine:
        found = layer_stores(engine.pool, engine.geometry)
    generator = torch.Generator().manual_seed(5)
    return [
        LayerStore(
            torch.randn(64, *layer.keys.shape[1:], generator=generator),
            torch.randn(64, *layer.values.shape[1:], generator=generator),
            layer.rope,
        )
        for layer in found
    ]


def test_the_same_text_elsewhere_has_the_same_sketch(sketcher: Sketcher, layers: list[LayerStore]) -> None:
    """Keys are compared un-rotated; the index in the segment counts, the position in the context does not."""
    here, there = Place(slice(0, 10), 100), Place(slice(30, 40), 700)
    for layer in layers:
        assert layer.rope is not None
        layer.keys[there.slots] = rotate(layer.keys[here.slots], 600, layer.rope)
        layer.values[there.slots] = layer.values[here.slots]
    torch.testing.assert_close(sketcher(layers, move(here)), sketcher(layers, move(there)), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sketcher(layers, move(here)), sketcher(layers, move(here, 5)), atol=1e-3)


def test_quoting_what_the_source_had_not_read_counts(sketcher: Sketcher, layers: list[LayerStore]) -> None:
    place = Place(slice(0, 4), 100)
    plain, quoting = sketcher(layers, move(place)), sketcher(layers, move(place, unseen=((5, 6, 7),)))
    weight = sketcher.settings.repeat_weight
    torch.testing.assert_close(quoting[..., :-2], plain[..., :-2])
    assert not plain[..., -2:].any()
    lengths = torch.tensor([0.0, 0.0, 1.0, 2.0])  # of the tokens 3 to 6: the last two are quoted
    for entry in (quoting[..., -2], quoting[..., -1]):
        torch.testing.assert_close(entry, (weight * lengths.log1p()).expand(sketcher.num_groups, -1))


def test_an_owner_is_sketched_once_and_forgotten_with_it(sketcher: Sketcher, layers: list[LayerStore]) -> None:
    owner = Identity()
    place = Place(slice(0, 10), 100, owner)
    num_known = len(sketcher._known)
    first = sketcher(layers, move(place))
    layers[0].keys[:10], layers[0].values[:10] = 0, 0
    torch.testing.assert_close(sketcher(layers, move(place)), first, rtol=0, atol=0)
    part = sketcher(layers, move(Place(slice(4, 10), 104, Identity()), 4))
    assert not torch.allclose(part, first[:, 4:], atol=1e-3)  # its owner had not been sketched
    assert len(sketcher._known) == num_known + 1
    del owner, place
    gc.collect()
    assert len(sketcher._known) == num_known
