"""Places in an engine: every one is come by, what is raised there comes out, and nothing stays behind."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from kvcomm import Engine
from kvcomm.lab import faults
from kvcomm.lab.faults import attention_watched, places_watched


class Thrown(Exception):
    """By these tests."""


def test_places_are_told_of(engine: Engine, tmp_path: Path) -> None:
    reached: Counter[str] = Counter()
    with places_watched(lambda place: reached.update([place])):
        completion = engine.generate("Some text.", max_new_tokens=3, logprobs=1, ignore_eos=True)
        with engine.context("Some other text.") as context:
            context.save(tmp_path / "context.safetensors")
        engine.restore(tmp_path / "context.safetensors").release()
    assert reached["sampler.sample"] == len(completion.token_ids) == 3
    assert {"sampler.make", "logprobs", "detokenizer.push", "tree.match", "tree.insert", "pool.allocate"} <= {*reached}
    assert {"request.completion", "context.complete", "snapshot.write", "snapshot.read"} <= {*reached}
    assert {*reached} <= {*faults.PLACES, "logprobs"}


def test_what_is_raised_at_a_place_comes_out_and_nothing_stays(engine: Engine) -> None:
    def at_a_draw(place: str) -> None:
        if place == "sampler.sample":
            raise Thrown

    originals = [(owner, name, owner.__dict__[name]) for owner, name in faults.PLACES.values()]
    with places_watched(at_a_draw), pytest.raises(Thrown):
        engine.generate("Some text.", max_new_tokens=1)
    assert engine.generate("Some text.", max_new_tokens=1).token_ids
    assert all(owner.__dict__[name] is original for owner, name, original in originals)


def test_attention_is_told_of_pass_by_pass_and_layer_by_layer(engine: Engine) -> None:
    reached: Counter[str] = Counter()
    attention_watched(engine, lambda place: reached.update([place]))
    engine.generate([7, 8, 9], max_new_tokens=3, ignore_eos=True)
    num_layers = engine.model.config.num_hidden_layers
    assert reached["attention.prepare"] == 3
    assert reached["attention.layer"] == 3 * num_layers
