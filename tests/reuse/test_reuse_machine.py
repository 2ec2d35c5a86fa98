"""Law 2: whatever exact and approximate requests, forks, evictions and audits come between, exact is exact."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvcomm.align.ladder import Rung
from kvcomm.config import EngineConfig
from kvcomm.engine.context import PREFILL_ONLY, Context
from kvcomm.engine.engine import Engine
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import RequestCancelled
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.segments import Segment
from kvcomm.reuse.policy import ReusePolicy
from tests.engine.conftest import ROWS_ONLY, greedy, some_tokens
from tests.limits import PATIENCE_S
from tests.reuse.reading import widen
from tests.stored import stored_by
from tests.tiny import tiny_model

CONFIG = EngineConfig(anchor_bytes=150_000, pool_tokens=2048)
SAMPLING = SamplingParams(max_new_tokens=3, ignore_eos=True)
LOOSE = ReusePolicy(max_divergence=50.0, confidence=0.5, audit=0.5)
RUNG = ReusePolicy(max_divergence=50.0, confidence=0.5, rungs=(Rung("token", 0.4), Rung("rotate", 0.3)))
"""One that looks first, and computes some of what is moved after all."""
HEALING = replace(LOOSE, heal=True, heal_within=2)
ROLES = [tuple(some_tokens(number, seed=number)) for number in (9, 14, 23)]
TINY = tiny_model()

roles, seeds = st.integers(0, 2), st.integers(0, 5)


class ReuseMachine(RuleBasedStateMachine):
    """Agents with three roles read a handful of questions, exactly or not, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(TINY.model, TINY.tokenizer, config=CONFIG)
        self.engine.reuse.parts.cost.model = ROWS_ONLY
        self.contexts: list[Context] = []
        self.num_aligned = self.num_healed = 0

    def prompt(self, role: int, seed: int) -> list[Segment]:
        text = tuple(some_tokens(30, seed=100 + seed))
        return [Segment(ROLES[role]), Segment(text, "question"), Segment((5, 6, 7))]

    @rule(role=roles, seed=seeds)
    def ask_exactly(self, role: int, seed: int) -> None:
        prompt = self.prompt(role, seed)
        completion = self.engine.generate(prompt, SAMPLING, policy=ReusePolicy.exact())
        tokens = [token for segment in prompt for token in segment.token_ids]
        assert list(completion.token_ids) == greedy(TINY.model, tokens, 3)
        assert completion.usage.aligned_tokens == 0

    @rule(role=roles, seed=seeds, policy=st.sampled_from([LOOSE, RUNG, HEALING]))
    def ask_approximately(self, role: int, seed: int, policy: ReusePolicy = LOOSE) -> None:
        usage = self.engine.generate(self.prompt(role, seed), SAMPLING, policy=policy).usage
        assert usage.exact_tokens + usage.aligned_tokens + usage.computed_tokens == usage.prompt_tokens
        self.num_aligned += usage.aligned_tokens
        assert (usage.healed_after is not None) <= policy.heal
        self.num_healed += usage.healed_after is not None

    @rule(role=roles, seed=seeds, policy=st.sampled_from([LOOSE, HEALING]))
    def open_a_context(self, role: int, seed: int, policy: ReusePolicy) -> None:
        if len(self.contexts) < 4:
            self.contexts.append(self.engine.context(self.prompt(role, seed), policy=policy))

    @rule(index=st.integers(0, 3), num_tokens=st.integers(1, 4), share=st.sampled_from([0.0, 0.5]))
    def move_text_and_heal(self, index: int, num_tokens: int, share: float) -> None:
        """Whatever a context holds, text moved behind it included: behind an answer that heals it is a cold one."""
        if index < len(self.contexts) and self.contexts[index].num_tokens < 200:
            context = self.contexts[index]
            context.policy = HEALING
            with self.engine.held():
                handle = context.submit(PREFILL_ONLY, prompt=self.prompt(0, index))
                request = next(each for each in self.engine.scheduler.requests() if each.handle is handle)
                request.rung = Rung("rotate", share)
            handle.result()
            was = context.fidelity
            usage = context.generate(max_new_tokens=num_tokens, ignore_eos=True).usage
            self.num_aligned += usage.aligned_tokens
            assert (usage.healed_after is None) == (was is Fidelity.EXACT or usage.not_healed is not None)
            assert context.fidelity is (Fidelity.EXACT if usage.not_healed is None else Fidelity.APPROXIMATE)
            if context.fidelity is Fidelity.EXACT:
                with context.fork() as child:
                    tokens = list(child.tokens)
                    assert list(child.generate(SAMPLING).token_ids) == greedy(TINY.model, tokens, 3)

    @rule(role=roles, seed=seeds, num_tokens=st.integers(1, 20), other=st.booleans())
    def give_up_while_it_heals(self, role: int, seed: int, num_tokens: int, other: bool) -> None:
        sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
        handle = self.engine.submit(self.prompt(role, seed), sampling, policy=HEALING, rung=Rung("rotate"))
        if other:
            self.ask_exactly(role, (seed + 1) % 6)
        seen = 0
        with suppress(RequestCancelled):
            for chunk in handle:
                seen += len(chunk.token_ids)
                if seen >= num_tokens:
                    handle.cancel()

    @rule(index=st.integers(0, 3))
    def fork_and_go_on(self, index: int) -> None:
        if index < len(self.contexts) < 4:
            child = self.contexts[index].fork()
            is_healed = child.generate(SAMPLING).usage.healed_after is not None
            assert child.fidelity is (Fidelity.EXACT if is_healed else self.contexts[index].fidelity)
            self.contexts.append(child)

    @rule(index=st.integers(0, 3))
    def release_a_context(self, index: int) -> None:
        if index < len(self.contexts):
            self.contexts.pop(index).release()

    @rule()
    def earn(self) -> None:
        for seed in range(6, 12):
            for role in (0, 1):
                self.engine.generate(self.prompt(role, seed), SAMPLING, policy=LOOSE)
        assert self.engine.wait_idle(PATIENCE_S)
        widen(self.engine)

    @rule(index=st.integers(0, 3))
    def repair(self, index: int) -> None:
        if index < len(self.contexts):
            context = self.contexts[index]
            assert context.repair().result(PATIENCE_S)
            assert context.fidelity is Fidelity.EXACT
            with context.fork() as child:
                tokens = list(child.tokens)
                assert list(child.generate(SAMPLING).token_ids) == greedy(TINY.model, tokens, 3)

    @rule()
    def rest(self) -> None:
        assert self.engine.wait_idle(PATIENCE_S)

    @rule()
    def clear(self) -> None:
        self.engine.cache.clear()

    @invariant()
    def every_reference_has_an_owner(self) -> None:
        self.engine.check_integrity()

    @rule(role=roles, seed=seeds, share=st.sampled_from([0.0, 0.5, 1.0]))
    def ask_at_a_rung(self, role: int, seed: int, share: float) -> None:
        prompt = self.prompt(role, seed)
        completion = self.engine.generate(prompt, SAMPLING, rung=Rung("rotate", share))
        if share == 1:
            tokens = [token for segment in prompt for token in segment.token_ids]
            assert list(completion.token_ids) == greedy(TINY.model, tokens, 3)

    @invariant()
    def nothing_approximate_passes_for_exact(self) -> None:
        """What is moved comes with a risk, or is a cold run's to the last number."""
        for rendition in stored_by(self.engine):
            assert (rendition.risk == 0) <= (rendition.fidelity is Fidelity.EXACT)

    @invariant()
    def nothing_approximate_is_in_the_tree(self) -> None:
        for context in self.contexts:
            if context.fidelity is Fidelity.APPROXIMATE:
                exact = context.sequence.num_exact
                with self.engine.lock:
                    path = self.engine.tree.match(self.engine.namespace(), context.sequence.token_ids)
                shared = set(path.pages.tolist()) & set(context.sequence.pages[-(-exact // 16) :].tolist())
                assert not shared

    def teardown(self) -> None:
        for context in self.contexts:
            context.release()
        assert self.engine.wait_idle(PATIENCE_S)
        self.engine.cache.clear()
        self.engine.check_integrity()
        self.engine.close()


TestReuse = ReuseMachine.TestCase
TestReuse.settings = settings(
    max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_the_machine_does_reuse_approximately() -> None:
    """Else the laws above would be tested on nothing."""
    machine = ReuseMachine()
    machine.earn()
    for seed in range(6):
        for role in (0, 1):
            machine.ask_approximately(role, seed)
    assert machine.num_aligned > 0
    machine.clear()
    for seed in range(6):
        for role in (0, 1):
            machine.ask_approximately(role, seed, HEALING)
    machine.teardown()
    assert machine.num_healed > 0
