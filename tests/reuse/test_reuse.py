"""Approximate reuse from outside: it is earned, it is bounded, it never touches an exact answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcomm.align.calibration import Calibration, Pair
from kvcomm.config import EngineConfig
from kvcomm.engine.context import Context
from kvcomm.engine.engine import Engine
from kvcomm.engine.request import Request
from kvcomm.engine.results import Completion
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import AnchorFileForeign, ContextReleased, EngineClosed, InvalidRequest
from kvcomm.lab.selectors import SELECTORS
from kvcomm.lab.variant import Variant
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.segments import Segment
from kvcomm.reuse.plan import SpanKind
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.reuse.replay import Case, Replay
from tests.engine.conftest import ROWS_ONLY, greedy, some_tokens
from tests.limits import PATIENCE_S
from tests.tiny import TinyModel, tiny_model

SAMPLING = SamplingParams(max_new_tokens=8, ignore_eos=True)
LOOSE = ReusePolicy(max_divergence=50.0, confidence=0.5, audit=0.0)
"""A bound that a random model keeps: what is tested here is who may be served, not how well."""
SMALL_BANKS = EngineConfig(anchor_bytes=475_000)
"""Banks of about 300 tokens, full after a few questions."""
ROLE_A, ROLE_B, TAIL = (tuple(some_tokens(number, seed=number)) for number in (21, 34, 5))


@pytest.fixture
def engine() -> Iterator[Engine]:
    tiny = tiny_model()
    with Engine(tiny.model, tiny.tokenizer, config=SMALL_BANKS) as engine:
        engine.reuse.cost.model = ROWS_ONLY
        yield engine
        engine.check_integrity()


def prompt(role: tuple[int, ...], seed: int, length: int = 90) -> list[Segment]:
    text = tuple(some_tokens(length, seed=1000 + seed))
    return [Segment(role), Segment(text, "question"), Segment(TAIL)]


def ask(engine: Engine, role: tuple[int, ...], seed: int, policy: ReusePolicy, length: int = 90) -> Completion:
    return engine.generate(prompt(role, seed, length), SAMPLING, policy=policy)


def earn(engine: Engine, policy: ReusePolicy, rounds: int = 20) -> None:
    """Let A and B read the same questions until something is known about moving them."""
    for seed in range(rounds):
        ask(engine, ROLE_A, seed, policy)
        ask(engine, ROLE_B, seed, policy)
        assert engine.wait_idle(PATIENCE_S)
    widen(engine)


def widen(engine: Engine) -> None:
    """A dozen random texts say little about how far the next one may be from them: let any distance pass."""
    for group in engine.reuse.groups.groups(engine.namespace()):
        pairs = [
            pair._replace(distance=10.0, residuals=tuple(None if each is None else 10.0 for each in pair.residuals))
            for pair in group.calibration.pairs
        ]
        group.calibration = Calibration(len(group.key.shares), pairs)


def test_approximation_starts_exact_and_is_earned(engine: Engine) -> None:
    ask(engine, ROLE_A, 0, LOOSE)
    first = ask(engine, ROLE_B, 0, LOOSE)
    assert first.usage.aligned_tokens == 0
    assert first.usage.reasons["no_anchors"] == 90
    assert first.usage.bound == (50.0, 0.5)
    earn(engine, LOOSE)
    ask(engine, ROLE_A, 99, LOOSE)
    served = ask(engine, ROLE_B, 99, LOOSE).usage
    assert served.aligned_tokens == 90
    assert served.exact_tokens == len(ROLE_B)
    assert served.computed_tokens == len(TAIL)
    assert served.reasons == {"glue": len(TAIL)}
    assert served.approximation is not None
    assert served.approximation.rung == 0.0


def test_between_anchors_and_calibration_the_reason_is_that(engine: Engine) -> None:
    policy = ReusePolicy(max_divergence=50.0, confidence=0.99, audit=0.0)
    earn(engine, policy)
    ask(engine, ROLE_A, 99, policy)
    assert ask(engine, ROLE_B, 99, policy).usage.reasons["uncalibrated"] == 90


def test_a_bound_that_nothing_keeps_is_exact_with_that_reason(engine: Engine) -> None:
    earn(engine, LOOSE)
    tight = ReusePolicy(max_divergence=1e-12, confidence=0.5, audit=0.0)
    ask(engine, ROLE_A, 99, tight)
    served = ask(engine, ROLE_B, 99, tight)
    assert served.usage.reasons["bound"] == 90
    assert served.usage.aligned_tokens == 0


def test_an_exact_policy_never_sees_any_of_it(engine: Engine) -> None:
    earn(engine, LOOSE)
    ask(engine, ROLE_A, 99, LOOSE)
    served = ask(engine, ROLE_B, 99, LOOSE)
    assert served.usage.aligned_tokens
    exact = ask(engine, ROLE_B, 99, ReusePolicy.exact())
    tokens = [token for segment in prompt(ROLE_B, 99) for token in segment.token_ids]
    assert exact.usage.aligned_tokens == 0
    assert exact.usage.computed_tokens >= 90 + len(TAIL)  # nothing of the approximate run is in the tree
    assert list(exact.token_ids) == greedy(engine.model, tokens, 8)


def test_a_request_that_does_not_read_the_cache_moves_nothing_and_is_a_source(engine: Engine) -> None:
    earn(engine, LOOSE)
    answer = engine.generate(prompt(ROLE_A, 99), SAMPLING, policy=LOOSE, reads_cache=False)
    again = engine.generate(prompt(ROLE_B, 99), SAMPLING, policy=LOOSE, reads_cache=False)
    for usage in (answer.usage, again.usage):
        assert (usage.exact_tokens, usage.aligned_tokens) == (0, 0)
        assert usage.reasons == {"cache_off": usage.prompt_tokens}
    tokens = [token for segment in prompt(ROLE_B, 99) for token in segment.token_ids]
    assert list(again.token_ids) == greedy(engine.model, tokens, len(again.token_ids))
    engine.clear_cache()
    engine.generate(prompt(ROLE_A, 99), SAMPLING, policy=LOOSE, reads_cache=False)
    assert ask(engine, ROLE_B, 99, LOOSE).usage.aligned_tokens == 90


def test_what_a_rung_computes_behind_no_cached_prefix_is_not_called_exact(engine: Engine) -> None:
    policy = replace(LOOSE, rungs=(0.3,))
    earn(engine, policy)
    engine.clear_cache()
    ask(engine, ROLE_A, 99, policy)
    served = ask(engine, ROLE_B, 99, policy).usage
    assert served.exact_tokens == 0
    assert served.aligned_tokens == 63
    assert served.reasons == {"new": len(ROLE_B), "rung": 27, "glue": len(TAIL)}


def test_a_fork_between_the_passes_of_a_rung_takes_nothing_half_done_along(engine: Engine) -> None:
    policy = replace(LOOSE, rungs=(0.3,))
    earn(engine, policy)
    ask(engine, ROLE_A, 99, policy)
    context = engine.context(ROLE_B, policy=policy)
    forks: list[Context] = []
    keep = engine.reuse.planner.check

    def check(request: Request) -> bool:
        done = keep(request)
        if not done and request.is_lent:
            forks.append(context.fork())
        return done

    engine.reuse.planner.check = check  # type: ignore[method-assign]
    context.extend(prompt(ROLE_B, 99)[1:])
    (child,) = forks
    assert context.fidelity is Fidelity.APPROXIMATE
    assert child.sequence.num_computed == len(ROLE_B)
    assert child.fidelity is Fidelity.EXACT
    tokens = list(child.tokens)
    assert list(child.generate(SAMPLING).token_ids) == greedy(engine.model, tokens, 8)
    for each in (context, child):
        each.release()


@pytest.mark.parametrize("rungs", [(0.0,), (0.5,)])
def test_the_answer_begins_as_the_stock_forward_does_on_the_same_kv(engine: Engine, rungs: tuple[float, ...]) -> None:
    policy = replace(LOOSE, rungs=rungs)
    earn(engine, policy)
    ask(engine, ROLE_A, 99, policy)
    context = engine.context(prompt(ROLE_B, 99), policy=policy)
    assert context.fidelity is Fidelity.APPROXIMATE
    cache = context.to_hf_cache()
    last = torch.tensor([[context.tokens[-1]]])
    with torch.inference_mode():
        stock = engine.model(last, past_key_values=cache, use_cache=True).logits[0, -1]
    assert context.ready_logits is not None
    torch.testing.assert_close(context.ready_logits, stock, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [9, 512])
def test_a_rung_computes_what_is_most_important(chunk: int) -> None:
    """The moved tokens that were computed after all are those a replay of the same prompt chooses."""
    policy = replace(LOOSE, rungs=(0.3,))
    tiny = tiny_model()
    config = replace(SMALL_BANKS, prefill_chunk=chunk, max_batch_tokens=chunk)
    with Engine(tiny.model, tiny.tokenizer, config=config) as engine:
        engine.reuse.cost.model = ROWS_ONLY
        earn(engine, policy)
        ask(engine, ROLE_A, 99, policy)
        chosen: list[np.ndarray] = []
        keep = engine.reuse.planner.check

        def check(request: Request) -> bool:
            done = keep(request)
            if done and request.approximation is not None:
                chosen.append(request.approximation.recomputed)
            return done

        engine.reuse.planner.check = check  # type: ignore[method-assign]
        served = ask(engine, ROLE_B, 99, policy)
        assert served.usage.reasons == {"glue": len(TAIL), "rung": 27}
        assert served.usage.aligned_tokens == 63
        (group,) = [each for each in engine.reuse.groups.groups(engine.namespace()) if each.num_approximated]
        replayed: list[np.ndarray] = []
        moved = engine.reuse.replayer.moved

        def spy(case: Case, exact: Tensor, corrections: Any, moves: Any, recomputed: np.ndarray) -> Replay:
            replayed.append(recomputed)
            return moved(case, exact, corrections, moves, recomputed)

        engine.reuse.replayer.moved = spy  # type: ignore[method-assign]
        variant = Variant("token", 0.3, "attention", group.strength)
        engine.measure(prompt(ROLE_B, 99), served.token_ids, [variant]).result(PATIENCE_S)
    assert chosen[0].tolist() == replayed[-1].tolist()
    assert len(chosen[0]) == 27


@pytest.mark.parametrize(("rungs", "limits"), [((0.3,), (0.0,)), ((0.3, 0.6), (0.0, 0.0)), ((0.3, 0.6), (0.0, 10.0))])
def test_tokens_far_from_their_estimates_escalate(
    engine: Engine, rungs: tuple[float, ...], limits: tuple[float, ...]
) -> None:
    """To the next rung whose probes pass, and behind the last one to an exact answer."""
    policy = replace(LOOSE, rungs=rungs)
    earn(engine, policy)
    for group in engine.reuse.groups.groups(engine.namespace()):
        pairs = [pair._replace(residuals=limits) for pair in group.calibration.pairs]
        group.calibration = Calibration(len(rungs), pairs)
    ask(engine, ROLE_A, 99, policy)
    served = ask(engine, ROLE_B, 99, policy)
    if limits[-1]:
        assert served.usage.reasons == {"glue": len(TAIL), "escalated": 54}
        assert served.usage.aligned_tokens == 36
    else:
        tokens = [token for segment in prompt(ROLE_B, 99) for token in segment.token_ids]
        assert served.usage.reasons == {"escalated": 90 + len(TAIL)}
        assert served.usage.approximation is None
        assert list(served.token_ids) == greedy(engine.model, tokens, 8)
        assert engine.num_cached(tokens) >= 112  # exact again, so it is kept


def test_text_unlike_what_is_known_goes_exact(engine: Engine) -> None:
    earn(engine, LOOSE)
    for group in engine.reuse.groups.groups(engine.namespace()):
        pairs = [pair._replace(distance=0.0) for pair in group.calibration.pairs]
        group.calibration = Calibration(len(group.key.shares), pairs)
    ask(engine, ROLE_A, 99, LOOSE)
    served = ask(engine, ROLE_B, 99, LOOSE)
    assert served.usage.aligned_tokens == 0
    assert served.usage.reasons["out_of_distribution"] == 90 + len(TAIL)
    tokens = [token for segment in prompt(ROLE_B, 99) for token in segment.token_ids]
    assert list(served.token_ids) == greedy(engine.model, tokens, 8)


def test_what_is_decoded_on_moved_kv_stays_approximate(engine: Engine) -> None:
    earn(engine, LOOSE)
    ask(engine, ROLE_A, 99, LOOSE)
    with engine.context(prompt(ROLE_B, 99), policy=LOOSE) as context:
        context.generate(SAMPLING)
        child = context.fork()
        child.extend(some_tokens(20, seed=4))
        assert {context.fidelity, child.fidelity} == {Fidelity.APPROXIMATE}
        assert engine.num_cached(list(child.tokens)) <= len(ROLE_B) + 1


def test_what_a_context_keeps_is_never_called_exact(engine: Engine) -> None:
    earn(engine, LOOSE)
    ask(engine, ROLE_A, 99, LOOSE)
    with engine.context(prompt(ROLE_B, 99), policy=LOOSE) as context:
        first = context.generate(SAMPLING).usage
        context.extend(some_tokens(7, seed=5))
        second = context.generate(SAMPLING).usage
    assert (first.exact_tokens, first.aligned_tokens, first.computed_tokens) == (len(ROLE_B), 90, len(TAIL))
    assert second.exact_tokens == len(ROLE_B)
    # The last token of the answer is computed with what follows it.
    assert second.computed_tokens == 8
    assert second.aligned_tokens == 90 + len(TAIL) + 7
    assert second.reasons == {"new": 8}


LONGER = SamplingParams(max_new_tokens=24, ignore_eos=True)
ROLE_C = tuple(some_tokens(27, seed=77))


def chain(engine: Engine, seed: int, policies: tuple[ReusePolicy, ReusePolicy]) -> tuple[Completion, Completion]:
    """A reads a question, B answers it, C reads both; the policies are B's and C's."""
    ask(engine, ROLE_A, seed, ReusePolicy.exact())
    answer = engine.generate(prompt(ROLE_B, seed), LONGER, policy=policies[0])
    question = prompt(ROLE_B, seed)[1]
    read = [Segment(ROLE_C), question, Segment(TAIL), Segment(answer.token_ids, "b"), Segment(TAIL)]
    return answer, engine.generate(read, SAMPLING, policy=policies[1])


def test_risk_adds_up_along_a_chain(engine: Engine) -> None:
    """An answer given on moved KV is a source with a risk: of its own group, and on top of its reader's."""
    exact = ReusePolicy.exact()
    for seed in range(300, 326):  # C learns to read exact answers
        chain(engine, seed, (exact, LOOSE))
        assert engine.wait_idle(PATIENCE_S)
    earn(engine, LOOSE)  # B learns to read questions
    for seed in range(100, 106):  # C learns to read answers that B gave on moved KV
        chain(engine, seed, (LOOSE, LOOSE))
        assert engine.wait_idle(PATIENCE_S)
        widen(engine)
    first, second = chain(engine, 200, (LOOSE, LOOSE))
    assert first.usage.approximation is not None
    assert second.usage.approximation is not None
    (group,) = (each for each in engine.edge_groups() if each.key.digest == second.usage.approximation.group)
    assert [is_exact for _, is_exact in group.key.edges] == [True, False]
    own = group.calibration.predicted(0, LOOSE.confidence)
    assert second.usage.approximation.predicted == pytest.approx(own + first.usage.approximation.predicted)
    # A bound that each keeps alone, but not both together.
    between = own + first.usage.approximation.predicted / 2
    tight = replace(LOOSE, max_divergence=between)
    assert group.calibration.choose(between, tight.delta) is not None
    _, third = chain(engine, 201, (LOOSE, tight))
    assert third.usage.reasons.get("source_risk") == 90 + 24


def test_a_repaired_context_is_exact_and_serves_exact_requests(engine: Engine) -> None:
    earn(engine, LOOSE)
    ask(engine, ROLE_A, 99, LOOSE)
    with engine.context(prompt(ROLE_B, 99), policy=LOOSE) as context, context.fork() as child:
        context.generate(SAMPLING)
        tokens = list(context.tokens)
        assert context.fidelity is Fidelity.APPROXIMATE
        assert context.repair().result(PATIENCE_S)
        assert context.fidelity is Fidelity.EXACT
        assert child.fidelity is Fidelity.APPROXIMATE
        assert list(context.tokens) == tokens
        assert engine.num_cached(tokens) >= len(tokens) // 16 * 16 - 16
        more = context.generate(SAMPLING)
        assert list(more.token_ids) == greedy(engine.model, tokens, 8)
        assert more.usage.aligned_tokens == 0
        pages = context.sequence.pages.tolist()
        assert context.repair().result(PATIENCE_S)  # nothing to do is no failure, and nothing is computed
        assert context.sequence.pages.tolist() == pages
        engine.check_integrity()


def test_repairing_what_is_gone_or_goes_on(engine: Engine) -> None:
    earn(engine, LOOSE)
    ask(engine, ROLE_A, 99, LOOSE)
    context = engine.context(prompt(ROLE_B, 99), policy=LOOSE)
    with engine.lock:
        repairing = context.repair()
        running = context.submit(SAMPLING)  # goes first, and the twin grows by what it adds
    running.result()
    assert repairing.result(PATIENCE_S)
    assert context.fidelity is Fidelity.EXACT
    with engine.lock:
        repairing = context.repair()
        context.release()
    assert not repairing.result(PATIENCE_S)
    with pytest.raises(ContextReleased):
        context.repair()


def test_a_reader_waits_for_its_source_even_if_that_begins_like_an_older_text(engine: Engine) -> None:
    """The source's prefill then begins inside the segment; its reader is to move it all the same."""
    earn(engine, LOOSE)
    text = tuple(some_tokens(90, seed=5000))
    older, newer = (*text[:40], *some_tokens(50, seed=5001)), (*text[:40], *some_tokens(50, seed=5002))
    engine.generate([Segment(ROLE_A), Segment(older, "question"), Segment(TAIL)], SAMPLING, policy=LOOSE)
    with engine.lock:
        prompts = [[Segment(role), Segment(newer, "question"), Segment(TAIL)] for role in (ROLE_A, ROLE_B)]
        handles = [engine.submit(each, SAMPLING, policy=LOOSE) for each in prompts]
    source, reader = (handle.result() for handle in handles)
    assert source.usage.exact_tokens == len(ROLE_A) + 40
    assert reader.usage.aligned_tokens == 90


def test_an_audit_trips_the_breaker_and_the_group_goes_exact(engine: Engine) -> None:
    earn(engine, LOOSE)
    watched = ReusePolicy(max_divergence=1e-9, confidence=0.5, audit=1.0, learn=False)
    for group in engine.reuse.groups.groups(engine.namespace()):
        zeros = (0.0,) * len(group.key.shares)
        pairs = [Pair(zeros, pair.distance, pair.residuals) for pair in group.calibration.pairs] * 30
        group.calibration = Calibration(len(group.key.shares), pairs)
    reasons: set[str] = set()
    predicted: list[float] = []
    for seed in range(200, 230):
        ask(engine, ROLE_A, seed, watched)
        usage = ask(engine, ROLE_B, seed, watched).usage
        reasons |= usage.reasons.keys()
        predicted += [] if usage.approximation is None else [usage.approximation.predicted]
        assert engine.wait_idle(PATIENCE_S)
        if "breaker" in reasons:
            break
    assert "breaker" in reasons
    assert engine.reuse.learner.num_violations == engine.reuse.learner.num_audits > 3
    audits = sorted(audit for group in engine.edge_groups() for audit in group.audits)
    assert [audit.predicted for audit in audits] == predicted
    assert {(audit.bound, audit.is_violation) for audit in audits} == {((1e-9, 0.5), True)}


def test_the_spans_of_a_request_are_its_counts(engine: Engine) -> None:
    earn(engine, LOOSE)
    ask(engine, ROLE_A, 300, LOOSE)
    usage = ask(engine, ROLE_B, 300, LOOSE).usage
    ends = [0, *(span.end for span in usage.spans)]
    assert [span.start for span in usage.spans] == ends[:-1]
    assert ends[-1] == usage.prompt_tokens
    tokens = {kind: sum(span.end - span.start for span in usage.spans if span.kind is kind) for kind in SpanKind}
    counts = (usage.exact_tokens, usage.aligned_tokens, usage.computed_tokens)
    assert (tokens[SpanKind.EXACT], tokens[SpanKind.ALIGNED], tokens[SpanKind.COMPUTE]) == counts
    assert usage.aligned_tokens == 90


def test_measuring_gives_the_same_as_recomputing_everything(engine: Engine) -> None:
    earn(engine, LOOSE, rounds=3)
    answer = ask(engine, ROLE_A, 50, ReusePolicy.exact())
    assert answer.usage.aligned_tokens == 0
    answer = ask(engine, ROLE_B, 50, ReusePolicy.exact())
    variants = [Variant("rotate"), Variant("token"), *(Variant("token", 0.5, name) for name in SELECTORS)]
    outcomes = engine.measure(prompt(ROLE_B, 50), answer.token_ids, [*variants, Variant("token", 1.0)]).result(
        PATIENCE_S
    )
    assert [outcome.num_recomputed for outcome in outcomes] == [0, 0, 45, 45, 45, 45, 90]
    assert outcomes[-1].divergence == pytest.approx(0, abs=1e-6)
    assert outcomes[-1].agreement == 1.0
    assert min(outcome.divergence for outcome in outcomes[:2]) > 1e-5


def test_measuring_what_cannot_be_moved_gives_nothing(engine: Engine) -> None:
    assert engine.measure(prompt(ROLE_A, 3), [5, 6], [Variant("rotate")]).result(PATIENCE_S) == []
    with pytest.raises(InvalidRequest, match="empty answer"):
        engine.measure(prompt(ROLE_A, 3), [], [Variant("rotate")])


def test_whoever_waits_for_idle_work_hears_of_the_end() -> None:
    tiny = tiny_model()
    engine = Engine(tiny.model, tiny.tokenizer)
    with engine.lock:
        future = engine.measure(prompt(ROLE_A, 3), [5, 6], [Variant("rotate")])
        engine.reuse.idle.close()
    with pytest.raises(EngineClosed):
        future.result(PATIENCE_S)
    engine.close()


def test_anchors_under_a_calibration_stay_as_they_are(engine: Engine) -> None:
    """Requests leave them alone; teaching on purpose makes their groups begin anew."""
    earn(engine, LOOSE, rounds=3)
    prompts = prompt(ROLE_B, 60)
    ask(engine, ROLE_A, 60, ReusePolicy.exact())
    answer = ask(engine, ROLE_B, 60, ReusePolicy.exact())
    group = engine.calibrate(prompts, answer.token_ids, LOOSE).result(PATIENCE_S)
    assert group is not None
    assert group.contest.num_prompts == 1
    (edge,) = (edge for edge, _ in group.key.edges)
    before = engine.reuse.estimators["token"].evidence(engine.namespace(), edge)
    assert 0 < before < 300  # young: a request would have taught
    for role in (ROLE_A, ROLE_B):
        ask(engine, role, 61, LOOSE)
    assert engine.wait_idle(PATIENCE_S)
    assert engine.reuse.estimators["token"].evidence(engine.namespace(), edge) == before
    assert group.contest.num_prompts == 2
    assert engine.learn(prompt(ROLE_B, 61)).result(PATIENCE_S) > 0
    assert group.contest.num_prompts == 0


def test_what_was_learned_survives_in_a_folder(engine: Engine, tmp_path: Path) -> None:
    """A second engine approximates at once, and gives the same answer."""
    earn(engine, LOOSE)
    ask(engine, ROLE_A, 99, LOOSE)
    here = ask(engine, ROLE_B, 99, LOOSE)
    engine.save_anchors(tmp_path)
    with Engine(engine.model, engine.tokenizer, config=SMALL_BANKS) as other:
        other.reuse.cost.model = ROWS_ONLY
        profile = other.load_anchors(tmp_path)
        assert profile.num_dropped == 0
        assert profile.num_pairs > 0
        ask(other, ROLE_A, 99, LOOSE)
        there = ask(other, ROLE_B, 99, LOOSE)
    assert here.usage.aligned_tokens == there.usage.aligned_tokens == 90
    assert here.token_ids == there.token_ids


def test_another_models_anchors_and_larger_banks_are_refused(engine: Engine, tmp_path: Path) -> None:
    earn(engine, LOOSE, rounds=4)
    engine.save_anchors(tmp_path)
    tiny = tiny_model(seed=1)
    with Engine(tiny.model, tiny.tokenizer) as stranger, pytest.raises(AnchorFileForeign, match="another namespace"):
        stranger.load_anchors(tmp_path)
    small = EngineConfig(anchor_bytes=100_000)
    with Engine(engine.model, engine.tokenizer, config=small) as other:
        with pytest.raises(AnchorFileForeign, match="raise anchor_bytes"):
            other.load_anchors(tmp_path)
        assert not list(other.reuse.anchors.banks(other.namespace()))


def test_weights_of_other_heads_are_refused(engine: Engine, tmp_path: Path) -> None:
    """A file may be whole, sealed and still say something about another number of heads; no request may suffer."""
    earn(engine, LOOSE)
    for group in engine.edge_groups():
        group.head_weights = (1.0,) * (engine.reuse.num_looking_heads + 1)
    engine.save_anchors(tmp_path)
    with Engine(engine.model, engine.tokenizer, config=SMALL_BANKS) as other:
        with pytest.raises(AnchorFileForeign, match=r"weights for \d+ heads"):
            other.load_anchors(tmp_path)
        assert not other.edge_groups()
        assert not list(other.reuse.anchors.banks(other.namespace()))


def test_tenants_learn_for_themselves(engine: Engine) -> None:
    earn(engine, LOOSE)
    for role in (ROLE_A, ROLE_B):
        other = engine.generate(prompt(role, 99), SAMPLING, policy=LOOSE, tenant="other")
    assert other.usage.reasons["no_anchors"] == 90
    assert not list(engine.reuse.groups.groups(engine.namespace("other")))


def test_same_seed_same_bank_same_answer(shared_model: TinyModel) -> None:
    answers = []
    for _ in range(2):
        with Engine(shared_model.model, shared_model.tokenizer, config=SMALL_BANKS) as engine:
            engine.reuse.cost.model = ROWS_ONLY
            earn(engine, LOOSE)
            ask(engine, ROLE_A, 99, LOOSE)
            answers.append(ask(engine, ROLE_B, 99, LOOSE))
    assert answers[0].usage.aligned_tokens == answers[1].usage.aligned_tokens == 90
    assert answers[0].token_ids == answers[1].token_ids
