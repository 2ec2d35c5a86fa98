"""Whatever a tier does, every answer of the engines over it is the stock forward's, and no page is lost."""

from __future__ import annotations

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcomm import Engine, EngineConfig
from kvcomm.engine import read_ahead
from kvcomm.engine.context import Context
from kvcomm.reuse.cost import CostModel
from kvcomm.tiers.tier import Tier
from tests.engine.conftest import greedy, some_tokens
from tests.engine.tier_store import FaultyStore
from tests.limits import PATIENCE_S
from tests.tiny import tiny_model

RUN, NUM_NEW = 8, 3
TINY = tiny_model()
COMMON = some_tokens(40)
PROMPTS = [COMMON[:start] + some_tokens(60 - start, seed=start) for start in (0, 11, 24, 40)]
EXPECTED: dict[tuple[int, ...], list[int]] = {}
DEAR = CostModel(pass_s=1.0, row_s=1e6, pair_s=0, move_s=0)

engines = strategies.integers(0, 1)
numbers = strategies.integers(0, 100)


def expected(tokens: list[int]) -> list[int]:
    if tuple(tokens) not in EXPECTED:
        EXPECTED[tuple(tokens)] = greedy(TINY.model, tokens, NUM_NEW)
    return EXPECTED[tuple(tokens)]


class TierMachine(RuleBasedStateMachine):
    """Two engines with small pools over one store, each with a tier of its own, as two processes have."""

    @initialize()
    def begin(self) -> None:
        self.store = FaultyStore()
        self.tiers = [Tier(self.store, run_tokens=RUN) for _ in range(2)]
        self.engines = [self._engine(tier) for tier in self.tiers]
        self.contexts: list[Context] = []

    def _engine(self, tier: Tier) -> Engine:
        config = EngineConfig(page_size=4, pool_tokens=320, max_batch_tokens=24, prefill_chunk=8)
        engine = Engine(TINY.model, TINY.tokenizer, config=config, tier=tier)
        engine.reuse.parts.cost.model = DEAR
        return engine

    @rule(index=engines, which=strategies.sampled_from(PROMPTS), length=strategies.integers(2, 60))
    def generate(self, index: int, which: list[int], length: int) -> None:
        found = self.engines[index].generate(which[:length], max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        assert list(found.token_ids) == expected(which[:length])
        usage = found.usage
        assert usage.tier_tokens <= usage.exact_tokens
        assert usage.exact_tokens + usage.computed_tokens == length
        assert sum(usage.reasons.values()) == usage.computed_tokens

    @rule(index=engines)
    def generate_all_at_once(self, index: int) -> None:
        engine = self.engines[index]
        handles = [
            engine.submit(prompt[:33], max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True) for prompt in PROMPTS
        ]
        for prompt, handle in zip(PROMPTS, handles, strict=True):
            assert list(handle.result().token_ids) == expected(prompt[:33])

    @rule(index=engines, which=strategies.sampled_from(PROMPTS), cut=strategies.integers(1, 39))
    def extend_a_context(self, index: int, which: list[int], cut: int) -> None:
        with self.engines[index].context(which[:cut]) as context:
            found = context.extend(which[cut:40]).generate(max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        assert list(found.token_ids) == expected(which[:40])

    @rule(index=engines)
    def forget_the_cache(self, index: int) -> None:
        self.engines[index].cache.clear()

    @rule(index=engines)
    def write_all(self, index: int) -> None:
        if self.store.open_for_writes.is_set():
            assert self.engines[index].tiering.flush(PATIENCE_S)

    @rule(index=numbers)
    def alter(self, index: int) -> None:
        self.store.alter(index)

    @rule(index=numbers)
    def lose(self, index: int) -> None:
        self.store.lose(index)

    @rule()
    def fail_or_not(self) -> None:
        self.store.is_failing = not self.store.is_failing

    @rule(reads=strategies.booleans(), writes=strategies.booleans())
    def stand_still_or_not(self, *, reads: bool, writes: bool) -> None:
        for gate, is_open in ((self.store.open_for_reads, reads), (self.store.open_for_writes, writes)):
            gate.set() if is_open else gate.clear()

    @invariant()
    def check(self) -> None:
        for engine in getattr(self, "engines", ()):
            engine.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engines"):
            return
        self.store.close()
        for engine, tier in zip(self.engines, self.tiers, strict=True):
            engine.tiering.flush(PATIENCE_S)
            engine.close()
            tier.close()
            engine.cache.clear()
            engine.check_integrity()
            assert engine.cache.stats().num_free == engine.pool.num_pages


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tier that stands still is waited for, but not for long."""
    monkeypatch.setattr(read_ahead, "MAX_WAIT_S", 0.02)


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
