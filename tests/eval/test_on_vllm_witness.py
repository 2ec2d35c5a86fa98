"""A witness accepts answers that switch between moved and exact KV, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from transformers import PreTrainedModel

from eval.on_vllm_witness import Witness
from kvcomm import Engine, ReusePolicy, SamplingParams, Segment
from kvcomm.config import EngineConfig
from kvcomm.model.loading import LoadedModel
from tests.tiny import TinyModel

DOCUMENT = Segment(tuple(range(3, 83)), "document")
READ = [Segment((1, 7, 9, 8)), DOCUMENT, Segment((5, 6))]
ASKED = [Segment((1, 20, 30, 40, 50, 60, 70, 80)), DOCUMENT, Segment((11, 12))]
NUM_NEW = 6
STORY = (
    "Anna has 12 apples and gives a third of them to Ben, who already has 5. A train leaves at nine and travels 240 km "
    "at 80 km per hour. A shirt costs 40 euros and is sold for a quarter less. Seven boxes hold 12 pencils each, and 9 "
    "pencils are lost. The baker, whose name nobody knew, left town in spring and never wrote. Under the bridge lay a "
    "boat with red oars. Later it was sold to a fisherman from the north, who painted it blue."
)
"""Moved without a token computed, it is answered otherwise than exactly."""


@pytest.fixture
def engine(tiny: TinyModel) -> Iterator[Engine]:
    with Engine(tiny.model, tiny.tokenizer, config=EngineConfig(pool_tokens=2048)) as engine:
        yield engine


def _stock(model: PreTrainedModel, prompt: list[Segment], written: tuple[int, ...]) -> int:
    """What transformers alone writes next."""
    tokens = [token for segment in prompt for token in segment.token_ids]
    with torch.no_grad():
        return int(model(torch.tensor([[*tokens, *written]])).logits[0, -1].argmax())


def _answer(model: PreTrainedModel, prompt: list[Segment], num: int) -> tuple[int, ...]:
    written: tuple[int, ...] = ()
    for _ in range(num):
        written += (_stock(model, prompt, written),)
    return written


def test_the_stock_answer_follows_on_exact_kv(engine: Engine, tiny: TinyModel) -> None:
    answer = _answer(tiny.model, ASKED, NUM_NEW)
    with closing(Witness(engine, READ, ASKED, ReusePolicy.exact())) as witness:
        assert witness.plan == (0, None)
        assert witness.on_exact(answer) is witness.on_any(answer) is None
        for index in range(NUM_NEW):
            changed = list(answer)
            changed[index] = (changed[index] + 1) % 200
            assert witness.on_exact(changed) == witness.on_any(changed) == index


def test_an_answer_may_switch_but_each_token_needs_a_reason(smollm2: LoadedModel) -> None:
    encode, policy = smollm2.tokenizer.encode, ReusePolicy(0.05, 0.9, learn=False, audit=0.0)
    text, end = Segment(tuple(encode(STORY)), "document"), Segment(tuple(encode("\nWhat follows from this?")))
    read = [Segment(tuple(encode("You read documents and answer."))), text, end]
    asked = [Segment(tuple(encode("You are a careful critic who never repeats himself. Read: "))), text, end]
    exact = _answer(smollm2.model, asked, NUM_NEW)
    with Engine(smollm2.model, smollm2.tokenizer, config=EngineConfig(pool_tokens=4096)) as engine:
        engine.generate(read, max_new_tokens=1, policy=policy)
        with engine.empty_context(policy=policy) as context:
            usage = context.submit(SamplingParams(max_new_tokens=0), prompt=asked).result().usage
            with context.fork() as fork:
                moved = fork.generate(max_new_tokens=NUM_NEW, ignore_eos=True).token_ids
            # As if what was prepared could be loaded only after a preemption.
            with context.fork() as fork:
                fork.extend([Segment(exact[:2])])
                switched = exact[:2] + fork.generate(max_new_tokens=NUM_NEW - 2, ignore_eos=True).token_ids
    with (
        Engine(smollm2.model, smollm2.tokenizer, config=EngineConfig(pool_tokens=4096)) as engine,
        closing(Witness(engine, read, asked, policy)) as witness,
    ):
        assert witness.plan[0] == usage.aligned_tokens > 100
        assert witness.on_moved(moved) is witness.on_exact(exact) is None
        assert witness.on_moved(exact) == witness.on_exact(moved) == 0  # of this text they differ at once
        assert witness.on_any(moved) is witness.on_any(exact) is witness.on_any(switched) is None
        changed = (*switched[:3], (switched[3] + 1) % 1000, *switched[4:])
        assert witness.on_any(changed) == 3
