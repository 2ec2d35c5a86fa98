"""Approximate reuse from outside: it is earned, it is bounded, it never touches an exact answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcomm.align.calibration import Measured, Pair
from kvcomm.align.ladder import Rung
from kvcomm.align.readers import reader_of
from kvcomm.align.standings import Audit, Level
from kvcomm.config import EngineConfig
from kvcomm.engine.context import Context
from kvcomm.engine.engine import Engine
from kvcomm.engine.request import Request
from kvcomm.engine.results import Completion
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import AnchorFileForeign, ContextReleased, EngineClosed, InvalidRequest
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.segments import Segment
from kvcomm.model.attention.contract import IntArray
from kvcomm.reuse.attempt import ToCompute
from kvcomm.reuse.choosing import AttentionChooser, View
from kvcomm.reuse.decision import Acceptance
from kvcomm.reuse.plan import SpanKind
from kvcomm.reuse.policy import ReusePolicy
from tests.engine.conftest import ROWS_ONLY, greedy, some_tokens
from tests.limits import PATIENCE_S
from tests.reuse.reading import (
    LOOSE,
    ROLE_A,
    ROLE_B,
    SAMPLING,
    SMALL_BANKS,
    TAIL,
    TOKEN,
    ask,
    earn,
    measured_as,
    prompt,
    rewrite,
    tokens_of,
    widen,
)
from tests.stored import renditions_by
from tests.tiny import TinyModel, tiny_model

EXACT = ReusePolicy.exact()


def test_approximation_starts_exact_and_is_earned_by_requests_alone(learning: Engine) -> None:
    """With confidence 0.5 a single pair is enough, and no rung of the first one needs anchors."""
    ask(learning, ROLE_A, 0, LOOSE)
    first = ask(learning, ROLE_B, 0, LOOSE).usage
    assert first.aligned_tokens == 0
    assert first.reasons["uncalibrated"] == 90
    assert first.bound == (50.0, 0.5, None, 0)
    assert learning.wait_idle(PATIENCE_S)
    ask(learning, ROLE_A, 99, LOOSE)
    served = ask(learning, ROLE_B, 99, LOOSE).usage
    assert served.aligned_tokens == 90
    assert served.exact_tokens == len(ROLE_B)
    assert served.computed_tokens == len(TAIL)
    assert served.reasons == {"glue": len(TAIL)}
    assert served.bound == (50.0, 0.5, Level.OWN, 1)
    assert served.approximation is not None
    assert (served.approximation.rung, served.approximation.share) == ("rotate", 0.0)
    assert served.approximation.reader == reader_of(prompt(ROLE_B, 99)).digest


def test_anchors_are_used_once_there_are_enough(learning: Engine) -> None:
    ask(learning, ROLE_A, 0, TOKEN)
    assert ask(learning, ROLE_B, 0, TOKEN).usage.reasons["no_anchors"] == 90
    assert learning.wait_idle(PATIENCE_S)
    ask(learning, ROLE_A, 1, TOKEN)
    assert ask(learning, ROLE_B, 1, TOKEN).usage.reasons["uncalibrated"] == 90
    assert learning.wait_idle(PATIENCE_S)
    widen(learning)
    ask(learning, ROLE_A, 99, TOKEN)
    served = ask(learning, ROLE_B, 99, TOKEN).usage
    assert served.aligned_tokens == 90
    assert served.approximation is not None
    assert served.approximation.rung == "token"


def test_too_few_pairs_for_the_confidence_are_the_reason(learning: Engine) -> None:
    policy = replace(LOOSE, confidence=0.99)
    earn(learning, policy)
    ask(learning, ROLE_A, 99, policy)
    assert ask(learning, ROLE_B, 99, policy).usage.reasons["uncalibrated"] == 90


def test_a_bound_that_nothing_keeps_is_exact_with_that_reason(learning: Engine) -> None:
    earn(learning, LOOSE)
    tight = replace(LOOSE, max_divergence=1e-12)
    ask(learning, ROLE_A, 99, tight)
    served = ask(learning, ROLE_B, 99, tight)
    assert served.usage.reasons["bound"] == 90
    assert served.usage.aligned_tokens == 0


def test_an_exact_policy_never_sees_any_of_it(learning: Engine) -> None:
    earn(learning, LOOSE)
    ask(learning, ROLE_A, 99, LOOSE)
    served = ask(learning, ROLE_B, 99, LOOSE)
    assert served.usage.aligned_tokens
    exact = ask(learning, ROLE_B, 99, EXACT)
    assert exact.usage.aligned_tokens == 0
    assert exact.usage.computed_tokens >= 90 + len(TAIL)  # nothing of the approximate run is in the tree
    assert list(exact.token_ids) == greedy(learning.model, tokens_of(prompt(ROLE_B, 99)), 8)


def test_a_request_that_does_not_read_the_cache_moves_nothing_and_is_a_source(learning: Engine) -> None:
    earn(learning, LOOSE)
    answer = learning.generate(prompt(ROLE_A, 99), SAMPLING, policy=LOOSE, reads_cache=False)
    again = learning.generate(prompt(ROLE_B, 99), SAMPLING, policy=LOOSE, reads_cache=False)
    for usage in (answer.usage, again.usage):
        assert (usage.exact_tokens, usage.aligned_tokens) == (0, 0)
        assert usage.reasons == {"cache_off": usage.prompt_tokens}
    assert list(again.token_ids) == greedy(learning.model, tokens_of(prompt(ROLE_B, 99)), len(again.token_ids))
    learning.cache.clear()
    learning.generate(prompt(ROLE_A, 99), SAMPLING, policy=LOOSE, reads_cache=False)
    assert ask(learning, ROLE_B, 99, LOOSE).usage.aligned_tokens == 90


def test_what_a_rung_computes_behind_no_cached_prefix_is_not_called_exact(learning: Engine) -> None:
    policy = replace(LOOSE, rungs=(Rung("token", 0.3),))
    earn(learning, policy)
    learning.cache.clear()
    ask(learning, ROLE_A, 99, policy)
    served = ask(learning, ROLE_B, 99, policy).usage
    assert served.exact_tokens == 0
    assert served.aligned_tokens == 63
    assert served.reasons == {"new": len(ROLE_B), "rung": 27, "glue": len(TAIL)}


def test_a_fork_between_the_passes_of_a_rung_takes_nothing_half_done_along(
    learning: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = replace(LOOSE, rungs=(Rung("token", 0.3),))
    earn(learning, policy)
    ask(learning, ROLE_A, 99, policy)
    context = learning.context(ROLE_B, policy=policy)
    forks: list[Context] = []
    keep = Request.carry_out

    def carry_out(request: Request, todo: ToCompute) -> None:
        keep(request, todo)
        if request.is_lent:
            forks.append(context.fork())

    monkeypatch.setattr(Request, "carry_out", carry_out)
    context.extend(prompt(ROLE_B, 99)[1:])
    assert len(forks) == 2  # before it looks, and before it computes the rung's tokens
    assert context.fidelity is Fidelity.APPROXIMATE
    for child in forks:
        assert child.sequence.num_computed == len(ROLE_B)
        assert child.fidelity is Fidelity.EXACT
        tokens = list(child.tokens)
        assert list(child.generate(SAMPLING).token_ids) == greedy(learning.model, tokens, 8)
    for each in (context, *forks):
        each.release()


@pytest.mark.parametrize("rung", [Rung("token"), Rung("token", 0.5), Rung("rotate", 0.5)])
def test_the_answer_begins_as_the_stock_forward_does_on_the_same_kv(learning: Engine, rung: Rung) -> None:
    policy = replace(LOOSE, rungs=(rung,))
    earn(learning, policy)
    ask(learning, ROLE_A, 99, policy)
    with learning.context(prompt(ROLE_B, 99), policy=policy) as context:
        assert context.fidelity is Fidelity.APPROXIMATE
        cache = context.to_hf_cache()
        last = torch.tensor([[context.tokens[-1]]])
        with torch.inference_mode():
            stock = learning.model(last, past_key_values=cache, use_cache=True).logits[0, -1]
        assert context.ready_logits is not None
        torch.testing.assert_close(context.ready_logits, stock, atol=1e-4, rtol=1e-4)


def spied_choices(monkeypatch: pytest.MonkeyPatch) -> list[IntArray]:
    """What choosers choose from now on, in a row."""
    chosen: list[IntArray] = []
    keep = AttentionChooser.choose

    def choose(self: AttentionChooser, view: View, share: float) -> IntArray:
        found = keep(self, view, share)
        chosen.append(found)
        return found

    monkeypatch.setattr(AttentionChooser, "choose", choose)
    return chosen


@pytest.mark.parametrize("chunk", [9, 512])
def test_a_rung_computes_what_a_replay_of_it_chooses(
    shared_model: TinyModel, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the prompt's passes are cut; and the answer is worth what the replay says."""
    rung = Rung("token", 0.3)
    policy = replace(LOOSE, rungs=(rung,))
    config = replace(SMALL_BANKS, prefill_chunk=chunk, max_batch_tokens=chunk)
    with Engine(shared_model.model, shared_model.tokenizer, config=config) as engine:
        engine.reuse.parts.cost.model = ROWS_ONLY
        earn(engine, policy)
        ask(engine, ROLE_A, 99, policy)
        chosen = spied_choices(monkeypatch)
        served = ask(engine, ROLE_B, 99, policy)
        assert served.usage.reasons == {"glue": len(TAIL), "rung": 27}
        assert served.usage.aligned_tokens == 63
        (outcome,) = engine.reuse.measure(prompt(ROLE_B, 99), served.token_ids, [rung]).result(PATIENCE_S)
        assert served.usage.approximation is not None
        assert served.usage.approximation.residual == pytest.approx(outcome.residual, rel=1e-3)
        assert served.usage.approximation.distance == pytest.approx(outcome.distance, rel=1e-3)
    assert [each.tolist() for each in chosen] == [chosen[0].tolist()] * 2
    assert len(chosen[0]) == 27


LADDER = (Rung("token", 0.6), Rung("token", 0.3))


@pytest.mark.parametrize(("rungs", "limits"), [(LADDER[1:], (0.0,)), (LADDER, (0.0, 0.0)), (LADDER, (10.0, 0.0))])
def test_tokens_far_from_their_estimates_escalate(
    learning: Engine, rungs: tuple[Rung, ...], limits: tuple[float, ...]
) -> None:
    """To the next rung whose tokens pass, and behind the safest one to an exact answer."""
    policy = replace(LOOSE, rungs=rungs)
    earn(learning, policy)
    by_rung = dict(zip(rungs, limits, strict=True))

    def limited(pair: Pair) -> Pair:
        return replace(
            pair, measured={rung: Measured(each.divergence, by_rung[rung]) for rung, each in pair.measured.items()}
        )

    rewrite(learning, limited)
    ask(learning, ROLE_A, 99, policy)
    served = ask(learning, ROLE_B, 99, policy)
    if max(limits):
        assert served.usage.reasons == {"glue": len(TAIL), "escalated": 54}
        assert served.usage.aligned_tokens == 36
    else:
        tokens = tokens_of(prompt(ROLE_B, 99))
        assert served.usage.reasons == {"escalated": 90 + len(TAIL)}
        assert served.usage.approximation is None
        assert list(served.token_ids) == greedy(learning.model, tokens, 8)
        assert learning.cache.num_cached(tokens) >= 112  # exact again, so it is kept


def test_a_safer_rung_is_judged_as_its_replay_was(learning: Engine) -> None:
    """Bug: tokens that a bolder rung had computed before counted as their own estimates, so that residuals fell."""
    policy = replace(LOOSE, rungs=LADDER)
    earn(learning, policy)
    rewrite(learning, lambda pair: replace(pair, measured=_with_residual(pair, LADDER[1], 0.0)))
    ask(learning, ROLE_A, 99, policy)
    served = ask(learning, ROLE_B, 99, policy)
    assert served.usage.reasons["escalated"] == 54
    (outcome,) = learning.reuse.measure(prompt(ROLE_B, 99), served.token_ids, LADDER[:1]).result(PATIENCE_S)
    assert served.usage.approximation is not None
    assert served.usage.approximation.residual == pytest.approx(outcome.residual, rel=1e-3)


def _with_residual(pair: Pair, rung: Rung, residual: float) -> dict[Rung, Measured]:
    return {**pair.measured, rung: Measured(pair.measured[rung].divergence, residual)}


def test_text_unlike_what_is_known_goes_exact(learning: Engine) -> None:
    earn(learning, TOKEN)
    rewrite(learning, lambda pair: measured_as(pair, distance=0.0))
    ask(learning, ROLE_A, 99, TOKEN)
    served = ask(learning, ROLE_B, 99, TOKEN)
    assert served.usage.aligned_tokens == 0
    assert served.usage.reasons["out_of_distribution"] == 90 + len(TAIL)
    assert list(served.token_ids) == greedy(learning.model, tokens_of(prompt(ROLE_B, 99)), 8)


def test_what_is_decoded_on_moved_kv_stays_approximate(learning: Engine) -> None:
    earn(learning, LOOSE)
    ask(learning, ROLE_A, 99, LOOSE)
    with learning.context(prompt(ROLE_B, 99), policy=LOOSE) as context:
        context.generate(SAMPLING)
        with context.fork() as child:
            child.extend(some_tokens(20, seed=4))
            assert {context.fidelity, child.fidelity} == {Fidelity.APPROXIMATE}
            assert learning.cache.num_cached(list(child.tokens)) <= len(ROLE_B) + 1


def test_what_a_context_keeps_is_never_called_exact(learning: Engine) -> None:
    earn(learning, LOOSE)
    ask(learning, ROLE_A, 99, LOOSE)
    with learning.context(prompt(ROLE_B, 99), policy=LOOSE) as context:
        first = context.generate(SAMPLING).usage
        context.extend(some_tokens(7, seed=5))
        second = context.generate(SAMPLING).usage
    assert (first.exact_tokens, first.aligned_tokens, first.computed_tokens) == (len(ROLE_B), 90, len(TAIL))
    assert second.exact_tokens == len(ROLE_B)
    # The last token of the answer is computed with what follows it.
    assert second.computed_tokens == 8
    assert second.aligned_tokens == 90 + len(TAIL) + 7
    assert second.reasons == {"new": 8}


def test_text_on_kv_that_nobody_foresaw_is_no_source(learning: Engine) -> None:
    """Bug: what a context computed on top of approximate KV, moving nothing, passed for a source without risk."""
    earn(learning, LOOSE)
    ask(learning, ROLE_A, 99, LOOSE)
    with learning.context(prompt(ROLE_B, 99), policy=LOOSE) as context:
        context.extend([Segment(tuple(some_tokens(90, seed=1098)), "question"), Segment(TAIL)])
        assert context.fidelity is Fidelity.APPROXIMATE
        (rendition,) = renditions_by(learning, prompt(ROLE_B, 98)[1])
        assert (rendition.fidelity, rendition.risk) == (Fidelity.APPROXIMATE, float("inf"))
        usage = learning.generate([*prompt(ROLE_A, 99), *prompt((), 98)[1:]], SAMPLING, policy=LOOSE).usage
        assert (usage.aligned_tokens, usage.reasons["source_risk"]) == (0, 90)


LONGER = SamplingParams(max_new_tokens=24, ignore_eos=True)
ROLE_C = tuple(some_tokens(27, seed=77))


def chain(engine: Engine, seed: int, policies: tuple[ReusePolicy, ReusePolicy]) -> tuple[Completion, Completion]:
    """A reads a question, B answers it, C reads both; the policies are B's and C's."""
    ask(engine, ROLE_A, seed, EXACT)
    answer = engine.generate(prompt(ROLE_B, seed), LONGER, policy=policies[0])
    question = prompt(ROLE_B, seed)[1]
    read = [Segment(ROLE_C), question, Segment(TAIL), Segment(answer.token_ids, "b"), Segment(TAIL)]
    return answer, engine.generate(read, SAMPLING, policy=policies[1])


def test_risk_adds_up_along_a_chain(learning: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer given on moved KV is a source with a risk: what its reader may be off by comes on top."""
    earn(learning, LOOSE)  # B learns to read questions, and C by what all have learned
    monkeypatch.setattr(Acceptance, "predicted", 3.0)
    first, second = chain(learning, 200, (LOOSE, LOOSE))
    assert first.usage.approximation is not None
    assert second.usage.approximation is not None
    assert (first.usage.approximation.predicted, second.usage.approximation.predicted) == (3.0, 6.0)
    assert second.usage.bound == (50.0, 0.5, Level.POOL, 6)
    # Both texts fit each other in B's context; what is too far off there is left out, and the question's other source
    # is as good as ever.
    policy = replace(LOOSE, max_divergence=1.4)
    rewrite(learning, lambda pair: replace(pair, measured={rung: Measured(0.0, 10.0) for rung in pair.measured}))
    _, third = chain(learning, 201, (LOOSE, policy))
    assert third.usage.reasons["source_risk"] == 24
    assert third.usage.aligned_tokens == 90


def test_a_repaired_context_is_exact_and_serves_exact_requests(learning: Engine) -> None:
    earn(learning, LOOSE)
    ask(learning, ROLE_A, 99, LOOSE)
    with learning.context(prompt(ROLE_B, 99), policy=LOOSE) as context, context.fork() as child:
        context.generate(SAMPLING)
        tokens = list(context.tokens)
        assert context.fidelity is Fidelity.APPROXIMATE
        assert context.repair().result(PATIENCE_S)
        assert context.fidelity is Fidelity.EXACT
        assert child.fidelity is Fidelity.APPROXIMATE
        assert list(context.tokens) == tokens
        assert learning.cache.num_cached(tokens) >= len(tokens) // 16 * 16 - 16
        more = context.generate(SAMPLING)
        assert list(more.token_ids) == greedy(learning.model, tokens, 8)
        assert more.usage.aligned_tokens == 0
        pages = context.sequence.pages.tolist()
        assert context.repair().result(PATIENCE_S)  # nothing to do is no failure, and nothing is computed
        assert context.sequence.pages.tolist() == pages
        learning.check_integrity()


def test_repairing_what_is_gone_or_goes_on(learning: Engine) -> None:
    earn(learning, LOOSE)
    ask(learning, ROLE_A, 99, LOOSE)
    context = learning.context(prompt(ROLE_B, 99), policy=LOOSE)
    with learning.lock:
        repairing = context.repair()
        running = context.submit(SAMPLING)  # goes first, and the twin grows by what it adds
    running.result()
    assert repairing.result(PATIENCE_S)
    assert context.fidelity is Fidelity.EXACT
    with learning.lock:
        repairing = context.repair()
        context.release()
    assert not repairing.result(PATIENCE_S)
    with pytest.raises(ContextReleased):
        context.repair()


def test_a_reader_waits_for_its_source_even_if_that_begins_like_an_older_text(learning: Engine) -> None:
    """The source's prefill then begins inside the segment; its reader is to move it all the same."""
    earn(learning, LOOSE)
    text = tuple(some_tokens(90, seed=5000))
    older, newer = (*text[:40], *some_tokens(50, seed=5001)), (*text[:40], *some_tokens(50, seed=5002))
    learning.generate([Segment(ROLE_A), Segment(older, "question"), Segment(TAIL)], SAMPLING, policy=LOOSE)
    with learning.lock:
        prompts = [[Segment(role), Segment(newer, "question"), Segment(TAIL)] for role in (ROLE_A, ROLE_B)]
        handles = [learning.submit(each, SAMPLING, policy=LOOSE) for each in prompts]
    source, reader = (handle.result() for handle in handles)
    assert source.usage.exact_tokens == len(ROLE_A) + 40
    assert reader.usage.aligned_tokens == 90


@pytest.mark.parametrize(("basis", "level"), [("own", Level.OWN), ("pool", Level.POOL)])
def test_audits_trip_the_breaker_and_the_reader_goes_exact(learning: Engine, basis: str, level: Level) -> None:
    """Its own level begins anew; a level that others share is barred."""
    earn(learning, LOOSE)
    watched = replace(LOOSE, max_divergence=1e-9, audit=1.0, learn=False, basis=basis)

    def flawless(pair: Pair) -> Pair:
        return replace(pair, measured={rung: Measured(0.0, each.residual) for rung, each in pair.measured.items()})

    rewrite(learning, flawless)
    if level is Level.POOL:  # of others only
        standing = learning.reuse.parts.book.find(learning.namespace(), reader_of(prompt(ROLE_B, 0)).digest)
        assert standing is not None
        standing.pairs.clear()
    reasons: set[str] = set()
    predicted: list[float] = []
    for seed in range(200, 230):
        ask(learning, ROLE_A, seed, watched)
        usage = ask(learning, ROLE_B, seed, watched).usage
        reasons |= usage.reasons.keys()
        if usage.approximation is not None:
            assert usage.bound is not None
            assert usage.bound.level is level
            predicted.append(usage.approximation.predicted)
        assert learning.wait_idle(PATIENCE_S)
        if reasons & {"breaker", "uncalibrated", "bound"}:
            break
    auditor = learning.reuse.parts.learner.auditor
    assert auditor.num_violations == auditor.num_audits == len(predicted) > 0
    audits = sorted(audit for standing in learning.reuse.readers() for audit in standing.audits)
    assert [audit.predicted for audit in audits] == predicted
    assert {(audit.bound, audit.is_violation, audit.level) for audit in audits} == {((1e-9, 0.5), True, level)}


def test_audits_alone_decide_when_a_breaker_trips(learning: Engine) -> None:
    """While the working delta falls, nothing is accepted; what has been asked before then is all the evidence."""
    earn(learning, LOOSE)
    namespace, reader = learning.namespace(), reader_of(prompt(ROLE_B, 0))
    bound = LOOSE.bound
    assert bound is not None
    while not learning.reuse.parts.book.is_barred(namespace, reader, Level.POOL, bound):
        learning.reuse.parts.book.audited(namespace, reader, Audit(0.0, 60.0, 1.0, bound, Level.POOL))
    standing = learning.reuse.parts.book.find(namespace, reader.digest)
    assert standing is not None
    standing.pairs.clear()
    ask(learning, ROLE_A, 99, LOOSE)
    served = ask(learning, ROLE_B, 99, LOOSE)
    assert served.usage.reasons["breaker"] == 90
    assert list(served.token_ids) == greedy(learning.model, tokens_of(prompt(ROLE_B, 99)), 8)


def test_the_spans_of_a_request_are_its_counts(learning: Engine) -> None:
    earn(learning, LOOSE)
    ask(learning, ROLE_A, 300, LOOSE)
    usage = ask(learning, ROLE_B, 300, LOOSE).usage
    ends = [0, *(span.end for span in usage.spans)]
    assert [span.start for span in usage.spans] == ends[:-1]
    assert ends[-1] == usage.prompt_tokens
    tokens = {kind: sum(span.end - span.start for span in usage.spans if span.kind is kind) for kind in SpanKind}
    counts = (usage.exact_tokens, usage.aligned_tokens, usage.computed_tokens)
    assert (tokens[SpanKind.EXACT], tokens[SpanKind.ALIGNED], tokens[SpanKind.COMPUTE]) == counts
    assert usage.aligned_tokens == 90


def test_measuring_gives_the_same_as_recomputing_everything(learning: Engine) -> None:
    earn(learning, LOOSE, rounds=3)
    ask(learning, ROLE_A, 50, EXACT)
    answer = ask(learning, ROLE_B, 50, EXACT)
    rungs = [Rung("rotate"), Rung("token"), Rung("token", 0.5), Rung("token", 1.0), Rung("rotate", 1.0)]
    outcomes = learning.reuse.measure(prompt(ROLE_B, 50), answer.token_ids, rungs).result(PATIENCE_S)
    assert [outcome.num_recomputed for outcome in outcomes] == [0, 0, 45, 90, 90]
    for outcome in outcomes[3:]:
        assert outcome.divergence == pytest.approx(0, abs=1e-6)
        assert outcome.agreement == 1.0
    assert min(outcome.divergence for outcome in outcomes[:2]) > 1e-5


def test_measuring_what_cannot_be_moved_gives_nothing(learning: Engine) -> None:
    assert learning.reuse.measure(prompt(ROLE_A, 3), [5, 6], [Rung("rotate")]).result(PATIENCE_S) == []
    with pytest.raises(InvalidRequest, match="empty answer"):
        learning.reuse.measure(prompt(ROLE_A, 3), [], [Rung("rotate")])
    ask(learning, ROLE_A, 3, EXACT)
    with pytest.raises(InvalidRequest, match="estimator 'token' knows nothing about some segment"):
        learning.reuse.measure(prompt(ROLE_B, 3), [5, 6], [Rung("rotate"), Rung("token")]).result(PATIENCE_S)


def test_whoever_waits_for_idle_work_hears_of_the_end(shared_model: TinyModel) -> None:
    engine = Engine(shared_model.model, shared_model.tokenizer)
    with engine.lock:
        future = engine.reuse.measure(prompt(ROLE_A, 3), [5, 6], [Rung("rotate")])
        engine.reuse.parts.idle.close()
    with pytest.raises(EngineClosed):
        future.result(PATIENCE_S)
    engine.close()


def test_calibrating_adds_a_pair_and_leaves_anchors_alone(learning: Engine) -> None:
    earn(learning, TOKEN, rounds=2)
    ask(learning, ROLE_A, 60, EXACT)
    answer = ask(learning, ROLE_B, 60, EXACT)
    (standing,) = (each for each in learning.reuse.readers() if each.pairs)
    banks = {bank.edge: bank.snapshot() for bank in learning.reuse.parts.anchors.banks(learning.namespace())}
    before = len(standing.pairs)
    pair = learning.reuse.calibrate(prompt(ROLE_B, 60), answer.token_ids, LOOSE).result(PATIENCE_S)
    assert pair is not None
    assert set(pair.measured) == set(LOOSE.rungs)
    assert [*standing.pairs][before:] == [pair]
    assert learning.reuse.parts.book.pool(learning.namespace())[-1] == pair
    assert {bank.edge: bank.snapshot() for bank in learning.reuse.parts.anchors.banks(learning.namespace())} == banks
    assert learning.reuse.learn(prompt(ROLE_B, 60)).result(PATIENCE_S) > 0
    assert len(standing.pairs) == before + 1


def test_what_was_learned_survives_in_a_folder(learning: Engine, tmp_path: Path) -> None:
    """A second engine approximates at once, and gives the same answer."""
    earn(learning, TOKEN)
    ask(learning, ROLE_A, 99, TOKEN)
    here = ask(learning, ROLE_B, 99, TOKEN)
    learning.reuse.save(tmp_path)
    with Engine(learning.model, learning.tokenizer, config=SMALL_BANKS) as other:
        other.reuse.parts.cost.model = ROWS_ONLY
        profile = other.reuse.load(tmp_path)
        assert profile.knowledge.num_pairs > 0
        ask(other, ROLE_A, 99, TOKEN)
        there = ask(other, ROLE_B, 99, TOKEN)
    assert here.usage.aligned_tokens == there.usage.aligned_tokens == 90
    assert here.token_ids == there.token_ids
    assert here.usage.bound == there.usage.bound


def test_another_models_anchors_and_larger_banks_are_refused(learning: Engine, tmp_path: Path) -> None:
    earn(learning, TOKEN, rounds=4)
    learning.reuse.save(tmp_path)
    tiny = tiny_model(seed=1)
    with Engine(tiny.model, tiny.tokenizer) as stranger, pytest.raises(AnchorFileForeign):
        stranger.reuse.load(tmp_path)
    small = EngineConfig(anchor_bytes=100_000)
    with Engine(learning.model, learning.tokenizer, config=small) as other:
        with pytest.raises(AnchorFileForeign, match="raise anchor_bytes"):
            other.reuse.load(tmp_path)
        assert not list(other.reuse.parts.anchors.banks(other.namespace()))
        assert not other.reuse.readers()


def test_weights_of_other_heads_are_refused(learning: Engine, tmp_path: Path) -> None:
    """A file may be whole, sealed and still say something about another number of heads; no request may suffer."""
    earn(learning, TOKEN, rounds=2)
    learning.reuse.parts.book.heads(learning.namespace()).weights = (1.0,) * (
        learning.reuse.parts.num_looking_heads + 1
    )
    learning.reuse.save(tmp_path)
    with Engine(learning.model, learning.tokenizer, config=SMALL_BANKS) as other:
        with pytest.raises(AnchorFileForeign, match=r"weights for \d+ heads"):
            other.reuse.load(tmp_path)
        assert not other.reuse.readers()
        assert not list(other.reuse.parts.anchors.banks(other.namespace()))


def test_tenants_learn_for_themselves(learning: Engine) -> None:
    earn(learning, LOOSE)
    for role in (ROLE_A, ROLE_B):
        other = learning.generate(prompt(role, 99), SAMPLING, policy=LOOSE, tenant="other")
    assert other.usage.reasons["uncalibrated"] == 90
    assert not [standing for standing in learning.reuse.readers("other") if standing.pairs]
    assert not learning.reuse.parts.book.pool(learning.namespace("other"))


@pytest.mark.parametrize("change", [lambda pair: pair, lambda pair: measured_as(pair, distance=10.0)])
def test_same_seed_same_bank_same_answer(shared_model: TinyModel, change: Callable[[Pair], Pair]) -> None:
    answers: list[Any] = []
    for _ in range(2):
        with Engine(shared_model.model, shared_model.tokenizer, config=SMALL_BANKS) as engine:
            engine.reuse.parts.cost.model = ROWS_ONLY
            earn(engine, TOKEN)
            rewrite(engine, change)
            ask(engine, ROLE_A, 99, TOKEN)
            answers.append(ask(engine, ROLE_B, 99, TOKEN))
    assert answers[0].usage.aligned_tokens == answers[1].usage.aligned_tokens == 90
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].usage.approximation == answers[1].usage.approximation
