"""Attention of some rows, against the weights that the stock eager attention returns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvcomm.align.attention_mass import AttentionMass, damaged_layers, looking_layers
from kvcomm.align.spans import layer_stores
from kvcomm.engine.engine import Engine
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.runner import ModelRunner, Run
from tests.engine.conftest import some_tokens
from tests.tiny import TinyModel, tiny_model

TOKENS = np.array(some_tokens(150, seed=3), dtype=np.int32)
OTHER = np.array(some_tokens(20, seed=4), dtype=np.int32)
POSITIONS = torch.tensor([0, 5, 6, 77, 139])


def expected(tiny: TinyModel, layer_ids: range, first: int, end: int) -> torch.Tensor:
    tiny.model.set_attn_implementation("eager")
    with torch.no_grad():
        found = tiny.model(torch.from_numpy(TOKENS)[None].long(), output_attentions=True).attentions
    tiny.model.set_attn_implementation("sdpa")
    heads = torch.cat([found[layer_id][0] for layer_id in layer_ids])
    return heads[:, first:end].sum(1)[:, POSITIONS]


@pytest.mark.parametrize("rows", [(140, 150), (149, 150), (20, 150)])
@pytest.mark.parametrize("layer_ids", [range(2), range(1, 2)])
@pytest.mark.parametrize("cuts", [(150,), (145, 150), (30, 90, 141, 142, 150)])
def test_mass_is_that_of_the_stock_attention(rows: tuple[int, int], layer_ids: range, cuts: tuple[int, ...]) -> None:
    """However the prompt is cut into passes, and whatever else is computed with it."""
    tiny = tiny_model()
    with Engine(tiny.model, tiny.tokenizer) as engine:
        pool = engine.pool
        runner = ModelRunner(
            tiny.model, keys=pool.keys, values=pool.values, page_size=pool.page_size, backend=engine.backend
        )
        sequence, other = KVSequence(pool, TOKENS), KVSequence(pool, OTHER)
        for each in (sequence, other):
            engine.memory.make_writable(each, 0, each.num_tokens)
        slots = pool.slots(sequence.pages, len(TOKENS))
        mass = AttentionMass(layer_stores(pool, engine.geometry), layer_ids, *rows)
        for start, end in zip((0, *cuts), cuts, strict=False):
            runs = [Run(OTHER, other.pages, 0), Run(TOKENS[start:end], sequence.pages, start)]
            for _ in range(2):  # as after a pass that failed
                runner.forward(runs, watch=mass.watch(slots, len(OTHER), start, end))
        sequence.release()
        other.release()
    torch.testing.assert_close(mass.by_head(POSITIONS), expected(tiny, layer_ids, *rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("num_layers", "looking", "damaged"),
    [(1, range(1), range(1)), (2, range(1), range(1, 2)), (30, range(10, 25), range(15, 22))],
)
def test_every_model_has_layers_to_look_at(num_layers: int, looking: range, damaged: range) -> None:
    assert (looking_layers(num_layers), damaged_layers(num_layers)) == (looking, damaged)
