"""Learning: one exact prompt is enough for pairs and anchors at once, and who is audited."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from kvcomm.align.bound import Bound
from kvcomm.align.calibration import pairs_needed
from kvcomm.align.ladder import CORRECTED, DEFAULT_RUNGS, TURNED, Rung
from kvcomm.align.readers import reader_of
from kvcomm.align.standings import YOUNG_AUDITS, Level
from kvcomm.align.watch import Watch
from kvcomm.engine.engine import Engine
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.segments import Segment
from kvcomm.reuse.idle_work import Job, Urgency
from kvcomm.reuse.learner import ENOUGH_PAIRS
from kvcomm.reuse.policy import ReusePolicy
from tests.engine.conftest import greedy, some_tokens
from tests.limits import PATIENCE_S
from tests.reuse.reading import LOOSE, ROLE_A, ROLE_B, SAMPLING, TAIL, ask, earn, prompt, rewrite, tokens_of
from tests.stored import renditions_by

EXACT = ReusePolicy.exact()
NEVER = replace(LOOSE, max_divergence=1e-12)
"""A bound that nothing keeps: whoever asks by it is answered exactly, and learned from."""


def read(engine: Engine, seed: int, policy: ReusePolicy, *roles: tuple[int, ...]) -> None:
    for role in roles or (ROLE_A, ROLE_B):
        ask(engine, role, seed, policy)
    assert engine.wait_idle(PATIENCE_S)


def test_no_stage_waits_for_another_one(learning: Engine) -> None:
    """The first exact prompt gives a pair and anchors; the next one pairs for the rungs that need those, too."""
    read(learning, 0, NEVER)
    (first,) = learning.reuse.parts.book.pool(learning.namespace())
    assert set(first.measured) == set(TURNED)
    edge_tokens = [bank.snapshot().num_tokens for bank in learning.reuse.parts.anchors.banks(learning.namespace())]
    assert len(edge_tokens) == 2  # of its edge, and of its slots in any context
    assert min(edge_tokens) > 0
    read(learning, 1, NEVER)
    _, second = learning.reuse.parts.book.pool(learning.namespace())
    assert set(second.measured) == set(DEFAULT_RUNGS)
    assert set(second.distances) == {"token", "rotate"}
    assert (second.sources.num_segments, second.sources.num_tokens) == (1, 90)
    assert (second.sources.num_approximate, second.sources.num_unread) == (0, 0)


def test_a_pair_says_what_measuring_says(learning: Engine) -> None:
    """With the anchors of its moment: those that were there before it taught."""
    read(learning, 0, NEVER)
    read(learning, 1, NEVER)
    ask(learning, ROLE_A, 2, EXACT)
    answer = greedy(learning.model, tokens_of(prompt(ROLE_B, 2)), 32)
    outcomes = learning.reuse.measure(prompt(ROLE_B, 2), answer, DEFAULT_RUNGS).result(PATIENCE_S)
    read(learning, 2, NEVER, ROLE_B)
    pair = learning.reuse.parts.book.pool(learning.namespace())[-1]
    for rung, outcome in zip(DEFAULT_RUNGS, outcomes, strict=True):
        assert pair.measured[rung].divergence == pytest.approx(outcome.divergence, rel=1e-3, abs=1e-6)
        assert (pair.measured[rung].residual is None) is (outcome.residual is None) is (rung.share == 0)
        assert (pair.measured[rung].residual or 0.0) == pytest.approx(outcome.residual or 0.0, rel=1e-3)


def test_turned_keys_are_measured_until_enough_is_known(learning: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that have anchors need turned keys no more; the pool has enough of these for whoever has none."""
    monkeypatch.setattr("kvcomm.reuse.learner.ENOUGH_PAIRS", 3)
    assert pairs_needed(0.025) < ENOUGH_PAIRS
    for seed in range(5):
        read(learning, seed, NEVER)
    measured = [set(pair.measured) for pair in learning.reuse.parts.book.pool(learning.namespace())]
    assert measured == [set(TURNED), set(DEFAULT_RUNGS), set(DEFAULT_RUNGS), set(CORRECTED), set(CORRECTED)]


def test_text_flows_from_its_first_reader_to_the_others(learning: Engine) -> None:
    """What B left behind is no source for A, who had read the text before: that prompt teaches nothing about A."""
    read(learning, 0, NEVER)
    assert {standing.reader for standing in learning.reuse.readers() if standing.pairs} == {
        reader_of(prompt(ROLE_B, 0))
    }
    learning.cache.clear()
    read(learning, 0, NEVER, ROLE_B, ROLE_A)
    assert {standing.reader for standing in learning.reuse.readers() if standing.pairs} == {
        reader_of(prompt(ROLE_A, 0)),
        reader_of(prompt(ROLE_B, 0)),
    }


@pytest.mark.parametrize("policy", [EXACT, replace(NEVER, learn=False)], ids=["exact", "does not learn"])
def test_who_does_not_want_it_is_not_learned_from(learning: Engine, policy: ReusePolicy) -> None:
    read(learning, 0, policy)
    assert not learning.reuse.parts.book.pool(learning.namespace())
    assert not list(learning.reuse.parts.anchors.banks(learning.namespace()))


def test_several_answers_and_given_rungs_teach_nothing(learning: Engine) -> None:
    ask(learning, ROLE_A, 0, NEVER)
    learning.generate(prompt(ROLE_B, 0), replace(SAMPLING, n=2), policy=NEVER)
    learning.generate(prompt(ROLE_B, 0), SAMPLING, policy=NEVER, rung=Rung("rotate", 0.5), reads_cache=False)
    assert learning.wait_idle(PATIENCE_S)
    assert not learning.reuse.parts.book.pool(learning.namespace())


def test_young_readers_are_audited_one_by_one_and_others_by_the_rate(learning: Engine) -> None:
    earn(learning, LOOSE)
    watched = replace(LOOSE, audit=1e-9, learn=False)
    auditor, counts = learning.reuse.parts.learner.auditor, []
    for seed in range(100, 100 + YOUNG_AUDITS + 4):
        ask(learning, ROLE_A, seed, EXACT)
        assert ask(learning, ROLE_B, seed, watched).usage.approximation is not None
        assert learning.wait_idle(PATIENCE_S)
        counts.append(auditor.num_audits)
    assert counts == [*range(1, YOUNG_AUDITS + 1), *[YOUNG_AUDITS] * 4]
    standing = learning.reuse.parts.book.find(learning.namespace(), reader_of(prompt(ROLE_B, 0)).digest)
    assert standing is not None
    assert (standing.num_approximated, standing.num_audited) == (YOUNG_AUDITS + 4, YOUNG_AUDITS)
    ask(learning, ROLE_A, 200, EXACT)
    ask(learning, ROLE_B, 200, replace(watched, audit=1.0))
    assert learning.wait_idle(PATIENCE_S)
    assert auditor.num_audits == YOUNG_AUDITS + 1


def test_audits_wait_where_they_stop_nothing(learning: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    earn(learning, LOOSE)
    book, namespace, reader = learning.reuse.parts.book, learning.namespace(), reader_of(prompt(ROLE_B, 0))
    jobs: list[Job] = []
    keep = learning.reuse.parts.idle.add

    def watched(job: Job) -> None:
        if job.urgency is Urgency.AUDIT:
            jobs.append(job)
        keep(job)

    monkeypatch.setattr(learning.reuse.parts.idle, "add", watched)
    ask(learning, ROLE_A, 100, EXACT)
    ask(learning, ROLE_B, 100, replace(LOOSE, audit=1.0, learn=False))
    assert learning.wait_idle(PATIENCE_S)
    assert LOOSE.bound is not None
    assert not jobs[0].can_wait()
    book.watch(namespace, reader, Level.OWN, LOOSE.bound).debt = 2.0
    assert jobs[0].can_wait()


def test_an_audited_prompt_that_teaches_bears_on_each_level_once(
    learning: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a prompt that broke the bound was owed for as an audit, and once more when its pair was measured."""
    earn(learning, LOOSE)
    book, namespace, reader, bound = (
        learning.reuse.parts.book,
        learning.namespace(),
        reader_of(prompt(ROLE_B, 0)),
        LOOSE.bound,
    )
    assert bound is not None
    own, pool = (book.watch(namespace, reader, level, bound) for level in (Level.OWN, Level.POOL))
    told: list[tuple[Watch, str]] = []
    for name in ("audited", "would_give"):
        real = getattr(Watch, name)

        def spy(watch: Watch, divergence: float, name: str = name, real: Callable[..., bool] = real) -> bool:
            told.append((watch, name))
            return real(watch, divergence)

        monkeypatch.setattr(Watch, name, spy)
    ask(learning, ROLE_A, 100, EXACT)
    usage = ask(learning, ROLE_B, 100, replace(LOOSE, audit=1.0)).usage
    assert usage.bound is not None
    assert usage.bound.level is Level.OWN
    assert learning.wait_idle(PATIENCE_S)
    assert [name for watch, name in told if watch is own] == ["audited"]
    assert [name for watch, name in told if watch is pool] == ["would_give"]


def test_nobody_is_audited_at_a_rate_of_nothing(learning: Engine) -> None:
    earn(learning, LOOSE)
    ask(learning, ROLE_A, 100, EXACT)
    assert ask(learning, ROLE_B, 100, LOOSE).usage.aligned_tokens == 90
    assert learning.wait_idle(PATIENCE_S)
    assert learning.reuse.parts.learner.auditor.num_audits == 0


def test_an_audit_says_what_a_replay_of_the_rung_says_and_teaches(learning: Engine) -> None:
    earn(learning, LOOSE)
    watched = replace(LOOSE, audit=1.0)
    ask(learning, ROLE_A, 100, EXACT)
    served = ask(learning, ROLE_B, 100, watched)
    assert served.usage.approximation is not None
    with learning.held():
        pass
    num_pairs = len(learning.reuse.parts.book.pool(learning.namespace()))
    assert learning.wait_idle(PATIENCE_S)
    standing = learning.reuse.parts.book.find(learning.namespace(), served.usage.approximation.reader)
    assert standing is not None
    (audit,) = standing.audits
    assert (audit.bound, audit.level) == (Bound(50.0, 0.5), Level.OWN)
    assert audit.predicted == served.usage.approximation.predicted
    assert len(learning.reuse.parts.book.pool(learning.namespace())) >= num_pairs
    answer = greedy(learning.model, tokens_of(prompt(ROLE_B, 100)), 32)
    (rung,) = (each for each in DEFAULT_RUNGS if str(each) == served.usage.approximation.rung)
    pair = learning.reuse.parts.book.pool(learning.namespace())[-1]
    assert pair.measured[rung].divergence == pytest.approx(audit.divergence, rel=1e-3, abs=1e-6)
    learning.cache.clear()
    ask(learning, ROLE_A, 100, EXACT)
    (outcome,) = learning.reuse.measure(prompt(ROLE_B, 100), answer, [rung]).result(PATIENCE_S)
    if rung.estimator == "rotate":  # whose estimates do not change with what was taught meanwhile
        assert audit.divergence == pytest.approx(outcome.divergence, rel=1e-3, abs=1e-6)


def test_an_audited_text_has_an_exact_source_from_then_on(learning: Engine) -> None:
    earn(learning, LOOSE)
    ask(learning, ROLE_A, 100, EXACT)
    assert ask(learning, ROLE_B, 100, replace(LOOSE, audit=1.0)).usage.aligned_tokens == 90
    assert learning.wait_idle(PATIENCE_S)
    tokens = tokens_of(prompt(ROLE_B, 100))
    assert learning.cache.num_cached(tokens) == len(tokens) // 16 * 16
    again = ask(learning, ROLE_B, 100, EXACT)
    assert list(again.token_ids) == greedy(learning.model, tokens, 8)
    found = renditions_by(learning, prompt(ROLE_B, 100)[1])
    assert {(each.fidelity, each.risk) for each in found if each.start == len(ROLE_B)} >= {(Fidelity.EXACT, 0.0)}


def test_an_audit_without_anything_to_hold_against_is_none(learning: Engine) -> None:
    earn(learning, LOOSE)
    tokens = tokens_of(prompt(ROLE_B, 100))
    learning.reuse.parts.trials._ends = frozenset(greedy(learning.model, tokens, 1))
    ask(learning, ROLE_A, 100, EXACT)
    assert ask(learning, ROLE_B, 100, replace(LOOSE, audit=1.0)).usage.aligned_tokens == 90
    assert learning.wait_idle(PATIENCE_S)
    assert learning.reuse.parts.learner.auditor.num_audits == 0
    learning.check_integrity()


def test_exact_prompts_let_a_delta_that_fell_rise_again(learning: Engine) -> None:
    """Violations have driven it down until nothing is accepted; then what exact prompts would have got counts."""
    earn(learning, LOOSE)
    reader, bound = reader_of(prompt(ROLE_B, 0)), LOOSE.bound
    assert bound is not None
    watch = learning.reuse.parts.book.watch(learning.namespace(), reader, Level.OWN, bound)
    pool = learning.reuse.parts.book.watch(learning.namespace(), reader, Level.POOL, bound)  # which does not decide
    watch.debt = pool.debt = 2.0
    assert watch.working_delta <= 0
    for seed in range(100, 104):
        ask(learning, ROLE_A, seed, EXACT)
        assert ask(learning, ROLE_B, seed, LOOSE).usage.reasons.get("bound") == 90
        assert learning.wait_idle(PATIENCE_S)
        if watch.working_delta >= bound.delta / 2:
            break
    assert watch.debt <= 1.5
    assert pool.debt <= 1.5
    latest = learning.reuse.parts.book.pool(learning.namespace())[-1]
    assert set(latest.measured) == set(TURNED)  # no more than it takes until text moves again


def test_learning_comes_where_it_pays_soonest(learning: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that lacks one pair comes before one that lacks many, and that before one that has enough."""
    policy = replace(NEVER, confidence=0.8, basis="own")
    role_c = tuple(some_tokens(27, seed=77))
    for seed in range(2):  # B has two pairs of nine
        read(learning, seed, policy)
    with learning.held():
        pass
    queued: list[float] = []
    keep = learning.reuse.parts.idle.add

    def watched(job: Job) -> None:
        if job.urgency is Urgency.STUDY:
            queued.append(job.pays_after)
        keep(job)

    monkeypatch.setattr(learning.reuse.parts.idle, "add", watched)
    for seed, role in itertools.product((50,), (ROLE_A, role_c, ROLE_B)):
        ask(learning, role, seed, policy)
    assert learning.wait_idle(PATIENCE_S)
    needed = pairs_needed(0.1)
    assert queued[0] > 0
    assert queued[1] / queued[0] == pytest.approx((needed - 2) / needed)


def test_documents_in_any_order_share_a_bank_and_are_turned_among_themselves(learning: Engine) -> None:
    """A passage is the same passage in any slot: one edge, one reader, whatever their number and order."""
    passages = [tuple(some_tokens(24, seed=3000 + number)) for number in range(5)]

    def row(role: tuple[int, ...], *order: int) -> list[Segment]:
        slots = [Segment(passages[number], f"document_{place}") for place, number in enumerate(order, 1)]
        return [Segment(role), *slots, Segment(TAIL)]

    orders = ((0, 1, 2, 3), (3, 1, 0), (2, 0, 4, 1), (1, 3, 4, 2, 0))
    readers = {reader_of(row(ROLE_A, *order)).digest for order in orders}
    assert len(readers) == 1
    learning.generate(row(ROLE_A, *orders[0]), SAMPLING, policy=LOOSE)
    for order in orders[1:]:
        learning.generate(row(ROLE_A, *order), SAMPLING, policy=NEVER)
        assert learning.wait_idle(PATIENCE_S)
    (standing,) = (each for each in learning.reuse.readers() if each.pairs)
    assert standing.reader.digest in readers
    assert len(standing.pairs) == 3
    assert not list(learning.reuse.parts.anchors.banks(learning.namespace()))  # among neighbors keys are only turned
    served = learning.generate(row(ROLE_A, 4, 2, 1, 3), SAMPLING, policy=LOOSE).usage
    assert served.reasons["displaced"] == 24
    assert served.aligned_tokens == 3 * 24
    learning.generate(row(ROLE_B, 0, 1, 2), SAMPLING, policy=NEVER)
    learning.generate(row(ROLE_B, 2, 1, 0), SAMPLING, policy=NEVER)
    assert learning.wait_idle(PATIENCE_S)
    edges = {bank.edge for bank in learning.reuse.parts.anchors.banks(learning.namespace())}
    assert {(edge.slot, edge.source_slot) for edge in edges} == {("document", "document")}
    assert len([edge for edge in edges if not edge.is_general]) == 1


def test_rewriting_is_what_it_says(learning: Engine) -> None:
    """Other tests stand on it: every pair is changed, once, and pool and readers have the same ones."""
    earn(learning, LOOSE, rounds=3)
    before = learning.reuse.parts.book.pool(learning.namespace())
    rewrite(learning, lambda pair: replace(pair, distances={"token": 0.5}))
    after = learning.reuse.parts.book.pool(learning.namespace())
    assert [pair.measured for pair in after] == [pair.measured for pair in before]
    assert {tuple(pair.distances.items()) for pair in after} == {(("token", 0.5),)}
