"""Engines over a shared tier: one reads what another has computed, and whatever the tier does, answers are exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from kvcomm import Engine, EngineConfig
from kvcomm.align.ladder import Rung
from kvcomm.engine import read_ahead
from kvcomm.errors import InvalidRequest
from kvcomm.memory.segments import Segment
from kvcomm.model.loading import LoadedModel
from kvcomm.reuse.cost import CostModel
from kvcomm.reuse.plan import SpanKind
from kvcomm.tiers.tier import Tier
from tests.engine.conftest import SMALL, greedy, some_tokens
from tests.engine.tier_store import FaultyStore
from tests.limits import PATIENCE_S, wait_for
from tests.lora import fill, with_adapters
from tests.tiny import TinyModel, tiny_model

RUN = 8
SECRET = b"sixteen bytes at least"
PATIENT = CostModel(pass_s=1.0, row_s=1e6, pair_s=0, move_s=0)
"""Where computing takes for ever everything is worth waiting for."""
IMPATIENT = CostModel(pass_s=1e-9, row_s=1e-12, pair_s=0, move_s=0)


@pytest.fixture(autouse=True)
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "MAX_WAIT_S", PATIENCE_S)


@pytest.fixture
def store() -> Iterator[FaultyStore]:
    made = FaultyStore()
    yield made
    made.close()


@contextmanager
def over(
    tiny: TinyModel, store: FaultyStore, *, cost: CostModel = PATIENT, secret: bytes | None = None, **config: int
) -> Iterator[Engine]:
    """An engine, and a tier of its own, over a store; at the end nothing of it is leaked."""
    tier = Tier(store, secret=secret, run_tokens=RUN)
    settings = EngineConfig(**{**vars(SMALL), **config})
    with Engine(tiny.model, tiny.tokenizer, config=settings, tier=tier) as engine:
        engine.reuse.parts.cost.model = cost
        yield engine
        engine.check_integrity()
    tier.queue.close(0)


def fill_tier(tiny: TinyModel, store: FaultyStore, *prompts: list[int], **settings: str) -> None:
    with over(tiny, store) as engine:
        for prompt in prompts:
            engine.generate(prompt, max_new_tokens=1, **settings)
        assert engine.tiering.flush(PATIENCE_S)


def test_what_one_engine_has_computed_another_one_reads(shared_model: TinyModel, store: FaultyStore) -> None:
    prompt = some_tokens(45)
    with over(shared_model, store) as first:
        cold = first.generate(prompt, max_new_tokens=20, temperature=0, logprobs=5, ignore_eos=True)
        assert first.tiering.flush(PATIENCE_S)
    assert cold.usage.tier_tokens == 0
    with over(shared_model, store) as second:
        warm = second.generate(prompt, max_new_tokens=20, temperature=0, logprobs=5, ignore_eos=True)
        again = second.generate(prompt, max_new_tokens=1)
    assert warm.token_ids == cold.token_ids == tuple(greedy(shared_model.model, prompt, 20))
    for one, other in zip(cold.logprobs or (), warm.logprobs or (), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    usage = warm.usage
    assert (usage.tier_tokens, usage.exact_tokens, usage.computed_tokens) == (40, 40, 5)
    assert (again.usage.tier_tokens, again.usage.exact_tokens) == (0, 44)


def test_a_folder_is_a_tier(shared_model: TinyModel, tmp_path: Path) -> None:
    prompt = some_tokens(600, seed=1)[:300]
    for expected in (0, 256):
        with Engine(shared_model.model, shared_model.tokenizer, config=SMALL, tier=str(tmp_path / "tier")) as engine:
            engine.reuse.parts.cost.model = PATIENT
            assert engine.generate(prompt, max_new_tokens=1).usage.tier_tokens == expected
            assert engine.tiering.flush(PATIENCE_S)


def test_answers_are_written_too(shared_model: TinyModel, store: FaultyStore) -> None:
    prompt = some_tokens(20)
    with over(shared_model, store) as first:
        answer = first.generate(prompt, max_new_tokens=21, ignore_eos=True).token_ids
        first.tiering.flush(PATIENCE_S)
    with over(shared_model, store) as second:
        assert second.generate([*prompt, *answer], max_new_tokens=1).usage.tier_tokens == 40


def test_a_context_reads_from_the_tier(shared_model: TinyModel, store: FaultyStore) -> None:
    prompt = some_tokens(40)
    fill_tier(shared_model, store, prompt)
    with over(shared_model, store) as engine, engine.context(prompt[:10]) as context:
        found = context.extend(prompt[10:]).generate(max_new_tokens=4, temperature=0, ignore_eos=True)
        assert found.usage.tier_tokens == 8 + 22  # of [0, 10) one run, then [10, 32)
        assert list(found.token_ids) == greedy(shared_model.model, prompt, 4)


def test_only_what_is_not_there_is_fetched_and_written(shared_model: TinyModel, store: FaultyStore) -> None:
    prompt = some_tokens(64)
    fill_tier(shared_model, store, prompt[:33])
    assert len(store.objects) == 4
    with over(shared_model, store) as engine:
        engine.generate(prompt[:17], max_new_tokens=1)
        num_gets = store.num_gets
        assert engine.generate(prompt, max_new_tokens=1).usage.tier_tokens == 15
        assert store.num_gets == num_gets + 2
        engine.tiering.flush(PATIENCE_S)
    assert len(store.objects) == 8


@pytest.mark.parametrize("fault", ["alter", "lose"])
def test_what_is_altered_or_lost_is_computed(shared_model: TinyModel, store: FaultyStore, fault: str) -> None:
    prompt = some_tokens(41)
    fill_tier(shared_model, store, prompt)
    with over(shared_model, store) as engine:
        for index in range(5) if fault == "alter" else ():
            store.alter(index)
        if fault == "lose":
            get = store.get
            store.get = lambda key: (store.objects.clear(), get(key))[1]  # type: ignore[method-assign]
        found = engine.generate(prompt, max_new_tokens=8, temperature=0, ignore_eos=True)
        assert list(found.token_ids) == greedy(shared_model.model, prompt, 8)
        reason = "tier_corrupt" if fault == "alter" else "tier_failed"
        assert found.usage.reasons == {reason: 40, "new": 1}
        if fault == "alter":  # what is damaged was removed, and can be written again
            engine.tiering.flush(PATIENCE_S)
    with over(shared_model, store) as engine:
        engine.generate(prompt, max_new_tokens=1)


def test_a_tier_that_stands_still_costs_no_answer(shared_model: TinyModel, store: FaultyStore) -> None:
    prompt = some_tokens(41)
    fill_tier(shared_model, store, prompt)
    with over(shared_model, store, cost=IMPATIENT) as engine:
        store.open_for_reads.clear()
        found = engine.generate(prompt, max_new_tokens=8, temperature=0, ignore_eos=True)
        assert list(found.token_ids) == greedy(shared_model.model, prompt, 8)
        assert found.usage.tier_tokens == 0
        assert sum(found.usage.reasons.values()) == 41


def test_what_fails_is_computed(shared_model: TinyModel, store: FaultyStore) -> None:
    prompt = some_tokens(41)
    fill_tier(shared_model, store, prompt)
    with over(shared_model, store) as engine:
        store.is_failing = True
        found = engine.generate(prompt, max_new_tokens=1)
        assert found.usage.computed_tokens == 41
        assert engine.tiering.tier is not None
        assert engine.tiering.tier.stats().is_failing
        store.is_failing = False


def test_what_comes_late_is_used_for_the_rest(
    shared_model: TinyModel, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tier stands still until the second pass of the prompt; what lies behind it is taken from the tier."""
    prompt = some_tokens(100)
    fill_tier(shared_model, store, prompt)
    with over(shared_model, store, cost=IMPATIENT, max_batch_tokens=20) as engine:
        monkeypatch.setattr(read_ahead, "MIN_DEADLINE_S", PATIENCE_S)
        store.open_for_reads.clear()
        forward, starts = engine.runner.forward, []

        def waiting(runs, **settings):  # type: ignore[no-untyped-def]
            starts.append(runs[0].start)
            if len(starts) == 2:
                store.open_for_reads.set()
                (request,) = engine.scheduler.requests()
                wait_for(lambda: request.ask is not None and request.ask.is_settled)
            return forward(runs, **settings)

        engine.runner.forward = waiting  # type: ignore[method-assign]
        found = engine.generate(prompt, max_new_tokens=6, temperature=0, ignore_eos=True)
        assert starts[:3] == [0, 20, 96]
        assert list(found.token_ids) == greedy(shared_model.model, prompt, 6)
        assert found.usage.tier_tokens == 56
        assert found.usage.computed_tokens == 44
        kinds = [span.kind for span in found.usage.spans]
        assert kinds == [SpanKind.COMPUTE, SpanKind.EXACT, SpanKind.COMPUTE]


def test_tenants_without_a_secret_do_not_use_the_tier(shared_model: TinyModel, store: FaultyStore) -> None:
    prompt = some_tokens(41)
    fill_tier(shared_model, store, prompt, tenant="ann")
    assert not store.objects
    fill_tier(shared_model, store, prompt)
    with over(shared_model, store) as engine:
        assert engine.generate(prompt, max_new_tokens=1, tenant="ann").usage.tier_tokens == 0
        assert engine.generate(prompt, max_new_tokens=1).usage.tier_tokens == 40


def test_tenants_share_nothing_in_a_tier(shared_model: TinyModel, store: FaultyStore) -> None:
    prompt = some_tokens(41)
    with over(shared_model, store, secret=SECRET) as engine:
        engine.generate(prompt, max_new_tokens=1, tenant="ann")
        engine.tiering.flush(PATIENCE_S)
    for tenant, expected in (("bob", 0), ("ann", 40)):
        with over(shared_model, store, secret=SECRET) as engine:
            assert engine.generate(prompt, max_new_tokens=1, tenant=tenant).usage.tier_tokens == expected
    with over(shared_model, store, secret=SECRET[::-1]) as engine:
        assert engine.generate(prompt, max_new_tokens=1, tenant="ann").usage.tier_tokens == 0


def test_other_weights_and_adapters_have_their_own(store: FaultyStore) -> None:
    tiny = tiny_model()
    prompt = some_tokens(41)
    fill_tier(tiny, store, prompt)
    with torch.no_grad():
        tiny.model.model.layers[0].mlp.up_proj.weight.mul_(2)
    with over(tiny, store) as engine:
        found = engine.generate(prompt, max_new_tokens=6, temperature=0, ignore_eos=True)
        assert found.usage.tier_tokens == 0
        assert list(found.token_ids) == greedy(tiny.model, prompt, 6)
        with torch.no_grad():
            tiny.model.model.layers[0].mlp.up_proj.weight.div_(2)
        assert engine.generate(prompt, max_new_tokens=1).usage.tier_tokens == 40
    tuned = TinyModel(with_adapters(tiny_model().model, "first"), tiny.tokenizer)
    fill(tuned.model, "first", seed=1)
    fill_tier(tuned, store, prompt, adapter="first")
    with over(tuned, store) as engine:
        assert engine.generate(prompt, max_new_tokens=1, adapter="first").usage.tier_tokens == 40


def test_what_waits_to_be_written_gives_way(shared_model: TinyModel, store: FaultyStore) -> None:
    """A pool that is held by nobody but the queue of a tier that stands still is free for requests."""
    store.open_for_writes.clear()
    with over(shared_model, store, pool_tokens=128) as engine:
        for seed in range(6):
            engine.generate(some_tokens(30, seed=seed), max_new_tokens=1)
            engine.check_integrity()
        engine.generate(some_tokens(120, seed=9), max_new_tokens=8, ignore_eos=True)
        engine.check_integrity()
        store.open_for_writes.set()


def test_closing_does_not_wait_for_a_tier_that_stands_still(shared_model: TinyModel, store: FaultyStore) -> None:
    prompt = some_tokens(41)
    fill_tier(shared_model, store, prompt)
    store.open_for_reads.clear()
    store.open_for_writes.clear()
    with over(shared_model, store) as engine:
        handle = engine.submit(prompt, max_new_tokens=1)
        wait_for(lambda: store.num_gets)
        engine.close()
        with pytest.raises(Exception, match="closed"):
            handle.result()


def test_a_request_that_is_cancelled_waits_for_nothing(shared_model: TinyModel, store: FaultyStore) -> None:
    prompt = some_tokens(41)
    fill_tier(shared_model, store, prompt)
    store.open_for_reads.clear()
    with over(shared_model, store) as engine:
        handle = engine.submit(prompt, max_new_tokens=1)
        other = engine.submit(some_tokens(5, seed=3), max_new_tokens=1)
        other.result()
        handle.cancel()
        engine.generate(some_tokens(5, seed=4), max_new_tokens=1)
        with pytest.raises(Exception, match="cancelled"):
            handle.result()
        store.open_for_reads.set()


def test_renditions_are_moved_by_another_engine(shared_model: TinyModel, store: FaultyStore) -> None:
    """A text that only another engine has read is moved as if it had been read here."""
    text, tail = Segment(tuple(some_tokens(24, seed=1)), "text"), Segment(tuple(some_tokens(6, seed=2)))
    read = (Segment(tuple(some_tokens(9, seed=3))), text, tail)
    wanted = (Segment(tuple(some_tokens(13, seed=4))), text, tail)
    settings = {"rung": Rung("rotate", 0.0), "max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    with Engine(shared_model.model, shared_model.tokenizer, config=SMALL) as alone:
        alone.reuse.parts.cost.model = PATIENT
        alone.generate(read, max_new_tokens=1)
        expected = alone.generate(wanted, **settings)
        assert expected.usage.aligned_tokens > 0
    with over(shared_model, store) as first:
        first.generate(read, max_new_tokens=1)
        first.tiering.flush(PATIENCE_S)
    with over(shared_model, store) as second:
        moved = second.generate(wanted, **settings)
        assert moved.token_ids == expected.token_ids
        assert moved.usage.aligned_tokens == expected.usage.aligned_tokens
        assert moved.usage.tier_tokens == 0
        exact = second.generate(wanted, max_new_tokens=6, temperature=0, ignore_eos=True)
        tokens = [token for segment in wanted for token in segment.token_ids]
        assert list(exact.token_ids) == greedy(shared_model.model, tokens, 6)


def test_no_tier_at_all_is_refused_by_name(shared_model: TinyModel) -> None:
    with pytest.raises(InvalidRequest, match="tier must be a Tier"):
        Engine(shared_model.model, shared_model.tokenizer, config=SMALL, tier=7)  # type: ignore[arg-type]


def test_beside_a_tier_that_is_expected_later_prompts_are_computed_in_pieces(
    shared_model: TinyModel, store: FaultyStore
) -> None:
    """As long as that costs next to nothing, and pieces are as long as the tier is expected to take."""
    prompt = some_tokens(200)
    fill_tier(shared_model, store, prompt)
    cost = CostModel(pass_s=0.001, row_s=0.1, pair_s=0, move_s=0)
    with over(shared_model, store, cost=cost, max_batch_tokens=400) as engine:
        assert engine.tiering.tier is not None
        engine.tiering.tier.reads.done(0, 1e-6)
        engine.tiering.tier.reads.done(1_000_000, 1_000_000 * 5.0 / (192 * 256))  # five seconds for what the tier has
        store.open_for_reads.clear()
        forward, rows = engine.runner.forward, []

        def counting(runs, **settings):  # type: ignore[no-untyped-def]
            rows.append(sum(len(run.token_ids) for run in runs))
            return forward(runs, **settings)

        engine.runner.forward = counting  # type: ignore[method-assign]
        found = engine.generate(prompt, max_new_tokens=4, temperature=0, ignore_eos=True)
        store.open_for_reads.set()
    assert list(found.token_ids) == greedy(shared_model.model, prompt, 4)
    assert len(rows) >= 5
    assert max(rows) < 100


def test_the_real_model(smollm2: LoadedModel, tmp_path: Path) -> None:
    """Through files, in whole runs of 256: greedy tokens are the same, and logits within 1e-4."""
    prompt = [int(token) for token in np.random.default_rng(5).integers(1000, 40_000, 300)]
    settings = {"max_new_tokens": 6, "temperature": 0, "logprobs": 5, "ignore_eos": True}
    found = []
    for expected in (0, 256):
        with Engine(
            smollm2.model, smollm2.tokenizer, weights_id=smollm2.weights_digest, tier=str(tmp_path / "tier")
        ) as engine:
            engine.reuse.parts.cost.model = PATIENT
            found.append(engine.generate(prompt, **settings))
            assert found[-1].usage.tier_tokens == expected
            assert engine.tiering.flush(PATIENCE_S)
    cold, warm = found
    assert warm.token_ids == cold.token_ids
    for one, other in zip(cold.logprobs or (), warm.logprobs or (), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
