"""Measurements: what they ask of the engine, what they leave behind, and arithmetic on samples. Never how fast."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.errors import InvalidRequest, PoolTooSmall, PromptTooLong
from kvcomm.lab import timings as benchmark
from kvcomm.lab.timings import Samples
from tests.tiny import TinyModel

PAGE_BYTES = 16 * 2 * 2 * (8 + 8) * 4
"""Of the tiny model: tokens, layers, heads, key and value dims, bytes of a float32."""


@pytest.fixture
def engine(tiny: TinyModel) -> Engine:
    return Engine(tiny.model, tiny.tokenizer, config=EngineConfig(pool_tokens=1024))


def assert_idle(engine: Engine) -> None:
    """No context, no request and, but for the cache, no page is left."""
    engine.check_integrity()
    engine.cache.clear()
    stats = engine.cache.stats()
    assert engine.contexts == ()
    assert stats.num_free == stats.num_pages


def test_samples() -> None:
    seconds = Samples((4.0, 1.0, 2.0, 3.0))

    assert seconds.median == 2.5
    assert seconds.quartiles == (1.75, 3.25)
    assert seconds.per(Samples((2.0, 2.0, 4.0, 1.0))).values == (2.0, 0.5, 0.5, 3.0)
    assert seconds.rate(8).values == (2.0, 8.0, 4.0, pytest.approx(8 / 3))
    assert seconds.scaled(1e3).values == (4000.0, 1000.0, 2000.0, 3000.0)
    with pytest.raises(ValueError, match="shorter"):
        seconds.per(Samples((1.0,)))


def test_random_tokens(engine: Engine) -> None:
    take = benchmark.random_tokens(engine, seed=3)
    prompt = take(4000)

    assert prompt == benchmark.random_tokens(engine, seed=3)(4000)
    assert prompt != take(4000)
    special = set(engine.tokenizer.all_special_ids)
    assert special
    assert set(prompt) == set(range(len(engine.tokenizer))) - special


def test_prefix_hit(engine: Engine) -> None:
    take = benchmark.random_tokens(engine)

    hit = benchmark.measure_prefix_hit(engine, take, num_prefix_tokens=33, num_tail_tokens=5)

    assert hit.num_cached_tokens == 33
    assert hit.cold_s > 0
    assert hit.cached_s > 0
    assert_idle(engine)


@pytest.mark.parametrize("num_tail_tokens", [1, 3])
def test_prefix_hit_with_equal_tails(engine: Engine, num_tail_tokens: int) -> None:
    """Tails that begin alike would make the hit longer than the prefix: others are drawn."""
    calls = iter([[5] * 20, *([token] * num_tail_tokens for token in (7, 7, 8, 7, 9))])

    hit = benchmark.measure_prefix_hit(
        engine, lambda _: next(calls), num_prefix_tokens=20, num_tail_tokens=num_tail_tokens, num_hits=2
    )

    assert hit.num_cached_tokens == 20
    assert next(calls, None) is None


def test_prefix_hit_without_different_tails(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="only 1 different tokens; 4 are needed"):
        benchmark.measure_prefix_hit(engine, lambda num: [5] * num, num_prefix_tokens=20, num_tail_tokens=3)


def test_prefix_hit_without_a_cache(tiny: TinyModel) -> None:
    engine = Engine(tiny.model, tiny.tokenizer, config=EngineConfig(pool_tokens=1024, cache=False))

    with pytest.raises(InvalidRequest, match="0 of 33 prefix tokens came from the cache"):
        benchmark.measure_prefix_hit(engine, benchmark.random_tokens(engine), num_prefix_tokens=33, num_tail_tokens=5)


def test_decode_steps_leave_contexts_as_they_are(engine: Engine) -> None:
    take = benchmark.random_tokens(engine)
    with benchmark.prefilled(engine, take, num_contexts=3, num_tokens=20, num_room_tokens=5) as contexts:
        before = [context.tokens for context in contexts]
        assert len(set(before)) == 3

        step_s = benchmark.time_decode_step(engine, contexts, num_new_tokens=4)

        assert step_s > 0
        assert [context.tokens for context in contexts] == before
        assert len(engine.contexts) == 3
        with pytest.raises(ValueError, match="num_new_tokens=1"):
            benchmark.time_decode_step(engine, contexts, num_new_tokens=1)
    assert_idle(engine)


def test_decode_steps_are_steps_of_all_contexts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass computes one token of each context; none starts before all are in, however long that takes."""
    passes: list[int] = []
    submit = engine.scheduler.submit
    monkeypatch.setattr(engine.scheduler, "submit", lambda request: time.sleep(0.02) or submit(request))
    forward = engine.scheduler._runner.forward
    runner = engine.scheduler._runner
    monkeypatch.setattr(runner, "forward", lambda runs, **more: passes.append(len(runs)) or forward(runs, **more))
    with benchmark.prefilled(
        engine, benchmark.random_tokens(engine), num_contexts=3, num_tokens=20, num_room_tokens=5
    ) as contexts:
        passes.clear()
        benchmark.time_decode_step(engine, contexts, num_new_tokens=5)

    assert passes == [3, 3, 3, 3]


def test_answers_lie_right_behind_their_contexts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a request, which reserves the pages of its answer with those of its prompt; also the second time."""
    tables: list[list[int]] = []
    forward = engine.scheduler._runner.forward
    monkeypatch.setattr(
        engine.scheduler._runner,
        "forward",
        lambda runs, **more: tables.extend(run.pages.tolist() for run in runs) or forward(runs, **more),
    )
    take = benchmark.random_tokens(engine)
    with benchmark.prefilled(engine, take, num_contexts=3, num_tokens=48, num_room_tokens=20) as contexts:
        for _ in range(2):
            tables.clear()
            benchmark.time_decode_step(engine, contexts, num_new_tokens=20)
            assert {len(pages) for pages in tables} == {5}
            assert all(pages == list(range(pages[0], pages[0] + 5)) for pages in tables)


def test_forks(engine: Engine) -> None:
    with engine.context(benchmark.random_tokens(engine)(30)) as context:
        cost = benchmark.measure_forks(engine, context, num_forks=7)

        assert len(cost.fork_s.values) == 7
        assert cost.bytes_copied == 0
        assert engine.contexts == (context,)
    assert_idle(engine)


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(32, 2 + 3), (40, 3 + 3), (30, 2 + 3 * 2)])
def test_branches(engine: Engine, num_tokens: int, num_pages: int) -> None:
    """Three branches write 5 KV each: behind full pages, inside a copied one, and over the end of a copied one."""
    prompt = benchmark.random_tokens(engine)(num_tokens)

    cost = benchmark.measure_branches(engine, prompt, num_branches=3, num_new_tokens=6)

    assert cost.pool_bytes == num_pages * PAGE_BYTES
    assert cost.expected_bytes == (-(-num_tokens // 16) + 3 * 2) * PAGE_BYTES
    answer = engine.generate(prompt, max_new_tokens=6, ignore_eos=True).token_ids
    assert cost.answers == (answer,) * 3
    assert cost.total_s == cost.prefill_s + cost.decode_s
    assert min(cost.prefill_s, cost.decode_s) > 0
    assert_idle(engine)


def test_restore(engine: Engine, tmp_path: Path) -> None:
    cost = benchmark.measure_restore(engine, benchmark.random_tokens(engine)(30), tmp_path)

    (file,) = tmp_path.iterdir()
    assert cost.file_bytes == file.stat().st_size
    assert min(cost.recompute_s, cost.restore_s) > 0
    assert_idle(engine)


def test_too_large_gives_everything_back(engine: Engine, tiny: TinyModel) -> None:
    take = benchmark.random_tokens(engine)

    with pytest.raises(PromptTooLong, match="513"):
        benchmark.measure_branches(engine, take(513), num_branches=2, num_new_tokens=2)
    with (
        pytest.raises(PromptTooLong),
        benchmark.prefilled(engine, take, num_contexts=1, num_tokens=513, num_room_tokens=5),
    ):
        pass
    assert_idle(engine)
    small = Engine(tiny.model, tiny.tokenizer, config=EngineConfig(pool_tokens=64))
    with pytest.raises(PoolTooSmall):
        benchmark.measure_prefix_hit(small, take, num_prefix_tokens=60, num_tail_tokens=5)
    assert_idle(small)
