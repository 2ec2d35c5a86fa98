"""Made-up layers and places in a pool, for the kernels: of the sizes that are wanted, and given back."""

from __future__ import annotations

import pytest
import torch

from kvcomm import Engine
from kvcomm.errors import PoolExhausted
from kvcomm.lab.kernels import Place, kv_bytes, made_layers, made_neighbors, made_offsets, make_ops, pool_layers
from kvcomm.model.rope import rotate


def test_places_in_a_pool_are_apart_and_given_back(engine: Engine) -> None:
    free = engine.cache.stats().num_free
    with pool_layers(engine, 3, 10) as (layers, places):
        assert engine.cache.stats().num_free == free - 9  # pages of 4 tokens
        assert kv_bytes(layers) == engine.cache.page_bytes // engine.cache.page_size
        slots = torch.cat([torch.arange(len(layers[0].keys))[place.slots] for place in places])
        assert len(set(slots.tolist())) == 30
        assert [place.start for place in places] == [100, 900, 1700]
        assert bool((layers[-1].values[places[1].slots] != 0).all())
    assert engine.cache.stats().num_free == free


def test_more_than_there_is_takes_nothing(engine: Engine) -> None:
    free = engine.cache.stats().num_free
    with pytest.raises(PoolExhausted), pool_layers(engine, 2, 4 * free):
        pass
    assert engine.cache.stats().num_free == free


def test_moving_made_up_layers_turns_their_keys() -> None:
    layers = made_layers(2, 20, 2, 8, dtype=torch.float32, device="cpu")
    assert kv_bytes(layers) == 2 * 2 * 2 * 8 * 4
    assert layers[0].rope is not None
    source, target = Place(slice(0, 10), 5), Place(slice(10, 20), 25)
    make_ops("reference", "cpu").rotate(layers, source, target)
    for layer in layers:
        assert layer.rope is not None
        turned = rotate(layer.keys[source.slots], torch.full((10,), 20), layer.rope)
        torch.testing.assert_close(layer.keys[target.slots], turned, atol=1e-5, rtol=0)
        assert torch.equal(layer.values[target.slots], layer.values[source.slots])


def test_offsets_are_for_all_layers_but_the_first() -> None:
    layers = made_layers(3, 8, 2, 8, dtype=torch.float32, device="cpu")
    offsets, neighbors = made_offsets(layers, 16), made_neighbors(layers, 4, 5, 16)
    assert offsets.keys[0] is offsets.values[0] is None
    assert all(rows is not None for rows in (*offsets.keys[1:], *offsets.values[1:]))
    assert neighbors.indices.shape == neighbors.weights.shape == (1, 4, 5)
    assert float(neighbors.weights.sum()) == pytest.approx(4.0)
    assert 0 <= int(neighbors.indices.min()) <= int(neighbors.indices.max()) < 16
