"""Contexts: extend, fork, generate, release, and a state machine against cold runs."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvcomm.config import EngineConfig
from kvcomm.engine.context import Context
from kvcomm.engine.engine import Engine
from kvcomm.engine.exchange import layer_shapes
from kvcomm.engine.results import Completion
from kvcomm.errors import (
    ContextBusy,
    ContextReleased,
    EmptyPrompt,
    InvalidRequest,
    PoolExhausted,
    QuotaExceeded,
    RequestCancelled,
    SnapshotCorrupt,
)
from kvcomm.memory.sequences import KVSequence
from kvcomm.memory.snapshots import read_snapshot, write_snapshot
from tests.engine.conftest import greedy, some_tokens
from tests.stalling import stalling
from tests.tiny import TinyModel, tiny_model

MORE = {"max_new_tokens": 400, "ignore_eos": True}


def test_extend_and_generate_equal_one_prompt(engine: Engine, shared_model: TinyModel) -> None:
    head, tail = some_tokens(33), some_tokens(18, seed=1)
    context = engine.context(head).extend(tail)
    out = context.generate(max_new_tokens=9, ignore_eos=True)
    expected = greedy(shared_model.model, head + tail, 9)
    assert list(out.token_ids) == expected
    assert context.tokens == (*head, *tail, *expected)
    assert (out.usage.prompt_tokens, out.usage.computed_tokens, out.usage.generated_tokens) == (51, 51, 9)
    assert [segment.name for segment in context.segments] == [None, None, "answer"]


def test_generating_on_continues_behind_the_answer(engine: Engine, shared_model: TinyModel) -> None:
    head = some_tokens(33)
    context = engine.context(head)
    first, second = (
        context.generate(max_new_tokens=5, ignore_eos=True),
        context.generate(max_new_tokens=6, ignore_eos=True),
    )
    assert [*first.token_ids, *second.token_ids] == greedy(shared_model.model, head, 11)
    assert second.usage.reasons == {"last_token": 1}


def test_branches_are_asked_at_once_from_an_event_loop(engine: Engine, shared_model: TinyModel) -> None:
    head, tails = some_tokens(33), [some_tokens(7, seed=seed) for seed in (1, 2)]
    parent = engine.context(head)
    branches = [parent.fork().extend(tail) for tail in tails]

    async def ask() -> list[Completion]:
        return await asyncio.gather(*(each.agenerate(max_new_tokens=8, ignore_eos=True) for each in branches))

    answers = asyncio.run(ask())
    for branch, tail, answer in zip(branches, tails, answers, strict=True):
        assert list(answer.token_ids) == greedy(shared_model.model, head + tail, 8)
        assert branch.tokens == (*head, *tail, *answer.token_ids)


def test_fork_copies_nothing_and_branches_do_not_see_each_other(engine: Engine, shared_model: TinyModel) -> None:
    head = some_tokens(35)  # the last page is partly filled
    parent = engine.context(head)
    before = engine.pool.bytes_copied
    children = [parent.fork() for _ in range(3)]
    assert engine.pool.bytes_copied == before
    for seed, child in enumerate(children):
        tail = some_tokens(6, seed=seed + 1)
        out = child.extend(tail).generate(max_new_tokens=5, ignore_eos=True)
        assert list(out.token_ids) == greedy(shared_model.model, head + tail, 5)
    assert parent.tokens == tuple(head)
    assert list(parent.generate(max_new_tokens=5, ignore_eos=True).token_ids) == greedy(shared_model.model, head, 5)


def test_forks_nest_and_survive_their_parents(engine: Engine, shared_model: TinyModel) -> None:
    context = engine.context(some_tokens(10))
    for seed in range(1, 12):
        child = context.fork().extend(some_tokens(3, seed=seed))
        context.release()
        context = child
    out = context.generate(max_new_tokens=4, ignore_eos=True)
    assert list(out.token_ids) == greedy(shared_model.model, list(context.tokens[:-4]), 4)


def test_a_busy_context_can_be_forked_but_not_written(engine: Engine, shared_model: TinyModel) -> None:
    head = some_tokens(21)
    context = engine.context(head)
    with stalling(engine, after=20):
        stream = context.stream(**MORE)
        seen = [next(stream).token_ids[0] for _ in range(5)]
        child = context.fork()
        with pytest.raises(ContextBusy, match="fork the context"):
            context.extend(some_tokens(3))
        with pytest.raises(ContextBusy, match="in flight"):
            context.save("nowhere")
    expected = greedy(shared_model.model, head, child.num_tokens - len(head) + 4)
    assert child.num_tokens >= len(head) + 5
    assert list(child.tokens[len(head) :]) == expected[: child.num_tokens - len(head)]
    assert seen == expected[:5]
    assert list(child.generate(max_new_tokens=4, ignore_eos=True).token_ids) == expected[-4:]
    stream.close()
    context.release()


def test_cancelled_generation_rolls_back(engine: Engine, shared_model: TinyModel) -> None:
    head = some_tokens(21)
    context = engine.context(head)
    with stalling(engine, after=20):
        handle = context.submit(**MORE)
        next(iter(handle))
        with pytest.raises(RequestCancelled):
            handle.result()
    assert context.tokens == tuple(head)
    assert list(context.generate(max_new_tokens=4, ignore_eos=True).token_ids) == greedy(shared_model.model, head, 4)


def test_release_while_busy_cancels(engine: Engine) -> None:
    context = engine.context(some_tokens(21))
    handle = context.submit(**MORE)
    context.release()
    context.release()
    assert handle.done
    with pytest.raises(ContextReleased, match="was released"):
        context.generate()
    with pytest.raises(ContextReleased):
        context.fork()


def test_several_choices_leave_the_context_alone(engine: Engine) -> None:
    context = engine.context(some_tokens(21))
    out = context.generate(max_new_tokens=5, n=3, temperature=1.0, seed=1, ignore_eos=True)
    assert len({choice.token_ids for choice in out.choices}) == 3
    assert context.num_tokens == 21


def test_with_statement_releases(engine: Engine) -> None:
    with engine.context(some_tokens(21)) as context:
        assert engine.cache.stats().num_in_contexts == 6
    assert context.released
    assert engine.cache.stats().num_in_contexts == 0


def test_empty_extension_and_bad_settings_change_nothing(engine: Engine) -> None:
    context = engine.context(some_tokens(21))
    with pytest.raises(EmptyPrompt):
        context.extend("")
    with pytest.raises(InvalidRequest, match=r"unknown sampling settings \['max_tokens'\]"):
        context.generate(max_tokens=5)
    with pytest.raises(InvalidRequest, match="limit of 512"):
        context.generate(max_new_tokens=600)
    assert context.num_tokens == 21
    assert not context.busy


def test_extension_is_shared_through_the_tree(engine: Engine) -> None:
    head, tail = some_tokens(20), some_tokens(24, seed=1)
    first, second = engine.context(head), engine.context(head)
    first.extend(tail)
    second.extend(tail)
    usage = second.generate(max_new_tokens=1).usage
    # 44 tokens: all full pages but the last token come from the first context.
    assert usage.computed_tokens <= 2 + 1


def test_snapshot_round_trip_continues_equally(engine: Engine, tmp_path: object, shared_model: TinyModel) -> None:
    head = some_tokens(37)
    context = engine.context(head, name="role")
    file = context.save(f"{tmp_path}/role.safetensors")
    restored = engine.restore(file)
    assert (restored.name, restored.tokens, restored.segments) == ("role", context.tokens, context.segments)
    expected = greedy(shared_model.model, head, 6)
    for each in (restored, context):
        assert list(each.generate(max_new_tokens=6, ignore_eos=True).token_ids) == expected


def test_snapshot_of_an_answered_context(engine: Engine, tmp_path: object, shared_model: TinyModel) -> None:
    head = some_tokens(37)
    context = engine.context(head)
    context.generate(max_new_tokens=6, ignore_eos=True)
    restored = engine.restore(context.save(f"{tmp_path}/a.safetensors"))
    expected = greedy(shared_model.model, head, 10)[6:]
    assert list(restored.generate(max_new_tokens=4, ignore_eos=True).token_ids) == expected


def test_a_snapshot_with_tokens_the_model_does_not_know_is_refused(engine: Engine, tmp_path: Path) -> None:
    """Such a file has all its digests right: somebody wrote it so."""
    with engine.context(some_tokens(20)) as context:
        file = context.save(tmp_path / "a.safetensors")
    snapshot = read_snapshot(
        file,
        namespace=engine.namespace(),
        shapes=layer_shapes(engine.geometry),
        dtype=torch.float32,
        vocab_size=engine.geometry.vocab_size,
    )
    alien = (*snapshot.header.token_ids[:-1], engine.geometry.vocab_size)
    header = snapshot.header.model_copy(update={"token_ids": alien})
    forged = tmp_path / "forged.safetensors"
    write_snapshot(forged, header, snapshot.keys, snapshot.values, snapshot.logits)
    with pytest.raises(SnapshotCorrupt, match=rf"token {alien[-1]}; the model knows {alien[-1]} tokens"):
        engine.restore(forged)
    assert engine.contexts == ()
    engine.check_integrity()


def test_a_forgotten_context_gives_its_pages_back(engine: Engine) -> None:
    engine.context(some_tokens(21)).fork()
    for _ in range(10_000):  # the step that made it may not be left yet
        gc.collect()
        if not engine.contexts:
            break
        time.sleep(0.01)
    assert engine.contexts == ()
    assert engine.cache.stats().num_in_contexts == 0


def test_quota_refuses_what_a_tenant_cannot_hold(engine: Engine) -> None:
    engine.cache.set_quota(held_tokens=32, tenant="a")
    context = engine.context(some_tokens(20), tenant="a")
    child = context.fork()  # shared pages count once
    with pytest.raises(QuotaExceeded, match=r"needs 4 more pages of 4 tokens; .* hold 5 of its 8"):
        context.extend(some_tokens(13, seed=1))
    with pytest.raises(QuotaExceeded, match="hold 5 of its 8"):
        engine.generate(some_tokens(12, seed=2), max_new_tokens=4, tenant="a")
    assert context.num_tokens == 20
    assert engine.generate(some_tokens(12, seed=2), max_new_tokens=4, tenant="b").usage.prompt_tokens == 12
    engine.cache.set_quota(tenant="a")
    context.extend(some_tokens(13, seed=1))
    child.release()


MODEL = tiny_model(seed=1)
PIECES = [some_tokens(num, seed=num) for num in (1, 3, 4, 5, 9, 17)]


class ContextMachine(RuleBasedStateMachine):
    """Random life of many contexts in a pool that is often full; every answer must equal a cold run's."""

    contexts = Bundle("contexts")

    def __init__(self) -> None:
        super().__init__()
        config = EngineConfig(page_size=4, pool_tokens=192, max_batch_tokens=24, prefill_chunk=8)
        self.engine = Engine(MODEL.model, MODEL.tokenizer, config=config, weights_id="fixed")
        self.tokens: dict[int, list[int]] = {}

    def _track(self, context: Context, tokens: list[int]) -> Context:
        self.tokens[id(context)] = tokens
        return context

    @rule(target=contexts, piece=st.sampled_from(PIECES), tenant=st.sampled_from(["a", "b"]))
    def create(self, piece: list[int], tenant: str) -> Context:
        try:
            return self._track(self.engine.context(piece, tenant=tenant), list(piece))
        except PoolExhausted:
            context = Context(self.engine, KVSequence(self.engine.pool), tenant=tenant)
            context.release()
            return self._track(context, [])

    @rule(context=contexts, piece=st.sampled_from(PIECES))
    def extend(self, context: Context, piece: list[int]) -> None:
        if context.released:
            return
        try:
            context.extend(piece)
        except PoolExhausted:
            return
        self.tokens[id(context)] += piece

    @rule(target=contexts, context=contexts)
    def fork(self, context: Context) -> Context:
        if context.released:
            with pytest.raises(ContextReleased):
                context.fork()
            return context
        return self._track(context.fork(), list(self.tokens[id(context)]))

    @rule(context=contexts, num_new=st.integers(1, 6))
    def generate(self, context: Context, num_new: int) -> None:
        if context.released:
            return
        tokens = self.tokens[id(context)]
        try:
            out = context.generate(max_new_tokens=num_new, ignore_eos=True)
        except PoolExhausted:
            return
        assert list(out.token_ids) == greedy(MODEL.model, tokens, num_new)
        tokens += out.token_ids

    @rule(context=contexts)
    def cancel(self, context: Context) -> None:
        if context.released:
            return
        try:
            handle = context.submit(max_new_tokens=8, ignore_eos=True)
        except PoolExhausted:
            return
        handle.cancel()
        handle.wait()
        self.tokens[id(context)] = list(context.tokens)

    @rule(context=consumes(contexts))
    def release(self, context: Context) -> None:
        context.release()

    @rule(piece=st.sampled_from(PIECES))
    def one_shot(self, piece: list[int]) -> None:
        try:
            out = self.engine.generate(piece, max_new_tokens=4, ignore_eos=True, tenant="a")
        except PoolExhausted:
            return
        assert list(out.token_ids) == greedy(MODEL.model, piece, 4)

    @rule()
    def clear(self) -> None:
        self.engine.cache.clear()

    @invariant()
    def nothing_is_lost(self) -> None:
        self.engine.check_integrity()
        for context in self.engine.contexts:
            assert list(context.tokens) == self.tokens[id(context)]
            assert not context.busy

    def teardown(self) -> None:
        for context in self.engine.contexts:
            context.release()
        self.engine.cache.clear()
        assert self.engine.cache.stats().num_free == self.engine.pool.num_pages
        self.engine.close()


TestContextMachine = ContextMachine.TestCase
TestContextMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_the_cold_run_itself_is_sensitive() -> None:
    """The machine compares with `greedy`; a different prefix must give a different answer, or it compares nothing."""
    with torch.no_grad():
        assert greedy(MODEL.model, PIECES[5], 6) != greedy(MODEL.model, PIECES[5][1:], 6)
