"""Sketches: what makes two tokens alike, and that nothing is sketched twice."""

from __future__ import annotations

import gc

import pytest
import torch

from kvcomm.align.ops.contract import LayerStore, Place
from kvcomm.align.sketch import Sketcher
from kvcomm.align.spans import layer_stores
from kvcomm.engine.engine import Engine
from kvcomm.memory.segments import Identity
from kvcomm.model.rope import rotate
from tests.tiny import tiny_model


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
    torch.testing.assert_close(sketcher(layers, here), sketcher(layers, there), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sketcher(layers, here), sketcher(layers, here, 5), atol=1e-3)


def test_an_owner_is_sketched_once_and_forgotten_with_it(sketcher: Sketcher, layers: list[LayerStore]) -> None:
    owner = Identity()
    place = Place(slice(0, 10), 100, owner)
    first = sketcher(layers, place)
    assert sketcher(layers, place) is first
    part = sketcher(layers, Place(slice(4, 10), 104, owner), 4)
    torch.testing.assert_close(part, first[:, 4:], atol=1e-5, rtol=1e-5)
    assert sketcher(layers, place._replace(owner=None)) is not first
    num_known = len(sketcher._known)
    del owner, place
    gc.collect()
    assert len(sketcher._known) == num_known - 1
