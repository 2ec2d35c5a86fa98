"""A witness accepts answers that switch between moved and exact KV, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from eval.on_vllm_witness import Witness
from kvcomm import Engine, ReusePolicy, SamplingParams, Segment
from kvcomm.config import EngineConfig
from kvcomm.model.loading import LoadedModel
from tests.tiny import TinyModel

DOCUMENT = Segment(tuple(range(3, 83)), "document")
READ = [Segment((1, 7, 9, 8)), DOCUMENT, Segment((5, 6))]
ASKED = [Segment((1, 20, 30, 40, 50, 60, 70, 80)), DOCUMENT, Segment((11, 12))]
NUM_NEW = 6


@pytest.fixture
def engine(tiny: TinyModel) -> Iterator[Engine]:
    with Engine(tiny.model, tiny.tokenizer, config=EngineConfig(pool_tokens=2048)) as engine:
        yield engine


def _greedy(tiny: TinyModel, written: tuple[int, ...]) -> int:
    prompt = [token for segment in ASKED for token in segment.token_ids]
    with torch.no_grad():
        logits = tiny.model(torch.tensor([[*prompt, *written]])).logits
    return int(logits[0, -1].argmax())


def _answer(tiny: TinyModel, num: int) -> tuple[int, ...]:
    written: tuple[int, ...] = ()
    for _ in range(num):
        written += (_greedy(tiny, written),)
    return written


def test_the_stock_answer_follows_on_exact_kv(engine: Engine, tiny: TinyModel) -> None:
    answer = _answer(tiny, NUM_NEW)
    with closing(Witness(engine, READ, ASKED, ReusePolicy.exact())) as witness:
        assert witness.plan == (0, None)
        assert witness.on_exact(answer) is witness.on_any(answer) is None
        for index in range(NUM_NEW):
            changed = list(answer)
            changed[index] = (changed[index] + 1) % 200
            assert witness.on_exact(changed) == witness.on_any(changed) == index


def test_an_answer_may_switch_but_each_token_needs_a_reason(smollm2: LoadedModel) -> None:
    encode = smollm2.tokenizer.encode
    text = Segment(
        tuple(encode(" ".join(f"In week {week} the river rose by {week * 7 % 5} feet." for week in range(20)))),
        "document",
    )
    read, asked = (
        [Segment(tuple(encode(begin))), text, Segment(tuple(encode("\nWhat follows from this?")))]
        for begin in ("You read documents and answer.", "You are a careful critic who never repeats himself. Read: ")
    )
    policy = ReusePolicy(0.05, 0.9, learn=False, audit=0.0)
    with Engine(smollm2.model, smollm2.tokenizer, config=EngineConfig(pool_tokens=4096)) as engine:
        engine.generate(read, max_new_tokens=1, policy=policy)
        with engine.empty_context(policy=policy) as context:
            usage = context.submit(SamplingParams(max_new_tokens=0), prompt=asked).result().usage
            with context.fork() as fork:
                moved = fork.generate(max_new_tokens=NUM_NEW, ignore_eos=True).token_ids
            exact = engine.generate(
                asked, max_new_tokens=NUM_NEW, ignore_eos=True, policy=ReusePolicy.exact(), reads_cache=False
            ).token_ids
            # Begun exactly, gone on with what was moved: as if what was prepared could be loaded after a preemption.
            begun = exact[:2]
            with context.fork() as fork:
                fork.extend([Segment(begun)])
                switched = (*begun, *fork.generate(max_new_tokens=4, ignore_eos=True).token_ids)
    with (
        Engine(smollm2.model, smollm2.tokenizer, config=EngineConfig(pool_tokens=4096)) as engine,
        closing(Witness(engine, read, asked, policy)) as witness,
    ):
        assert witness.plan[0] == usage.aligned_tokens > 100
        assert witness.on_moved(moved) is witness.on_exact(exact) is None
        assert witness.on_any(switched) is None
        changed = (*switched[:3], (switched[3] + 1) % 1000, *switched[4:])
        assert witness.on_any(changed) == 3
