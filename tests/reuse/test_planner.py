"""What is decided, on whose pairs, and why not: every reason comes about, and the caller's basis is kept to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from kvcomm.align.calibration import Measured, Pair, pairs_needed
from kvcomm.align.ladder import DEFAULT_RUNGS, TURNED, Rung
from kvcomm.align.readers import Reader, reader_of
from kvcomm.align.standings import Audit, Level
from kvcomm.engine.engine import Engine
from kvcomm.memory.segments import Segment
from kvcomm.reuse.cost import CostModel
from kvcomm.reuse.plan import Reason
from kvcomm.reuse.policy import ReusePolicy
from tests.engine.conftest import some_tokens
from tests.limits import PATIENCE_S
from tests.reuse.reading import LOOSE, ROLE_A, ROLE_B, SAMPLING, TAIL, ask, earn, measured_as, prompt, rewrite
from tests.stored import renditions_by

EXACT = ReusePolicy.exact()
POLICY = ReusePolicy(max_divergence=0.5, confidence=0.9, audit=0.0, rungs=TURNED, learn=False)
"""Nine pairs allow something, and nineteen one violation."""
READER = reader_of(prompt(ROLE_B, 0))
OTHER = Reader("0" * 64)
ROLE_C = tuple(some_tokens(27, seed=77))


def pair(divergence: float = 0.1, rungs: tuple[Rung, ...] = DEFAULT_RUNGS) -> Pair:
    """One with the same divergence at each of these rungs, and nothing else that could be in the way."""
    return Pair(
        {rung: Measured(divergence, 10.0 if rung.share else None) for rung in rungs}, {"token": 10.0, "rotate": 0.0}
    )


def know(engine: Engine, *, own: int = 0, pool: int = 0, prior: int = 0, divergence: float = 0.1) -> None:
    """So many pairs of the reader, of all (its own included), and of the model."""
    book, namespace = engine.reuse.parts.book, engine.namespace()
    with engine.lock:
        for _ in range(own):
            book.add(namespace, READER, pair(divergence))
        for _ in range(pool - own):
            book.add(namespace, OTHER, pair(divergence))
        for _ in range(prior):
            book.prior.add(pair(divergence))
        if prior:
            book.admit_prior(namespace)


def served(engine: Engine, policy: ReusePolicy, seed: int = 99) -> tuple[Level | None, int, dict[str, int]]:
    """By whose pairs B's request was moved, how many they are, and why what was computed was."""
    ask(engine, ROLE_A, seed, EXACT)
    usage = ask(engine, ROLE_B, seed, policy).usage
    assert usage.bound is not None
    assert (usage.bound.level is None) is (usage.aligned_tokens == 0)
    return usage.bound.level, usage.bound.num_pairs, dict(usage.reasons)


@pytest.mark.parametrize(
    ("own", "pool", "prior", "basis", "level", "num_pairs"),
    [
        (0, 0, 0, "prior", None, 0),
        (0, 0, 8, "prior", None, 0),
        (0, 0, 9, "prior", Level.PRIOR, 9),
        (0, 0, 300, "pool", None, 0),
        (0, 18, 300, "prior", Level.PRIOR, 300),
        (0, 19, 300, "prior", Level.POOL, 19),
        (9, 19, 300, "prior", Level.POOL, 19),
        (9, 12, 0, "prior", Level.POOL, 12),
        (9, 9, 0, "prior", Level.OWN, 9),
        (9, 300, 300, "own", Level.OWN, 9),
        (8, 300, 300, "own", None, 0),
        (19, 300, 300, "prior", Level.OWN, 19),
    ],
)
def test_counts_of_pairs_and_the_caller_s_basis_decide_by_whom(
    learning: Engine, own: int, pool: int, prior: int, basis: str, level: Level | None, num_pairs: int
) -> None:
    assert (pairs_needed(0.1), pairs_needed(0.05)) == (9, 19)
    know(learning, own=own, pool=pool, prior=prior)
    found, count, reasons = served(learning, replace(POLICY, basis=basis))
    assert (found, count) == (level, num_pairs)
    assert (reasons.get("uncalibrated") == 90) is (level is None)


def test_what_pairs_show_never_chooses_the_level(learning: Engine) -> None:
    """Its own pairs are bad, those of all others good: they are its own all the same."""
    know(learning, own=19, divergence=0.6)
    know(learning, pool=300)
    found, _, reasons = served(learning, POLICY)
    assert (found, reasons["bound"]) == (None, 90)


def test_a_level_that_was_found_not_to_hold_is_passed_over(learning: Engine) -> None:
    know(learning, pool=19, prior=30)
    bound = POLICY.bound
    assert bound is not None
    book, namespace = learning.reuse.parts.book, learning.namespace()
    assert served(learning, POLICY)[:2] == (Level.POOL, 19)
    while not book.is_barred(namespace, READER, Level.POOL, bound):
        book.audited(namespace, READER, Audit(0.0, 9.0, 0.1, bound, Level.POOL))
        if len(book.pool(namespace)) == 0:
            know(learning, pool=19)
    know(learning, pool=19 - len(book.pool(namespace)))
    assert served(learning, POLICY, seed=100)[0] is Level.PRIOR
    assert served(learning, replace(POLICY, basis="pool"), seed=101)[2]["breaker"] == 90
    # Another bound is another promise.
    assert served(learning, replace(POLICY, max_divergence=0.4), seed=102)[0] is Level.POOL


def test_the_boldest_rung_that_holds_of_the_first_ladder_that_can_be_used(learning: Engine) -> None:
    divergences = {TURNED[0]: 0.01, TURNED[1]: 0.1, TURNED[2]: 0.7}
    for _ in range(19):
        learning.reuse.parts.book.add(
            learning.namespace(), READER, Pair({rung: Measured(each, None) for rung, each in divergences.items()})
        )
    for epsilon, share in ((1.0, 0.0), (0.5, 0.15), (0.05, 0.3)):
        ask(learning, ROLE_A, 99, EXACT)
        usage = ask(learning, ROLE_B, 99, replace(POLICY, max_divergence=epsilon)).usage
        assert usage.approximation is not None
        assert usage.approximation.share == share
        assert usage.reasons.get("rung", 0) == int(share * 90)
        assert usage.approximation.predicted == {0.0: 0.7, 0.15: 0.1, 0.3: 0.01}[share]
        learning.cache.clear()
    # Anchors come first where there are any, and nowhere else.
    know(learning, own=19)
    both = replace(POLICY, rungs=DEFAULT_RUNGS, max_divergence=1.0)
    ask(learning, ROLE_A, 99, EXACT)
    usage = ask(learning, ROLE_B, 99, both).usage
    assert usage.approximation is not None
    assert usage.approximation.rung == "rotate"
    learning.reuse.learn(prompt(ROLE_B, 99)).result(PATIENCE_S)
    ask(learning, ROLE_A, 98, EXACT)
    usage = ask(learning, ROLE_B, 98, both).usage
    assert usage.approximation is not None
    assert usage.approximation.rung == "token"


def no_source(engine: Engine) -> dict[str, int]:
    know(engine, prior=30)
    return dict(ask(engine, ROLE_B, 99, POLICY).usage.reasons)


def displaced(engine: Engine) -> dict[str, int]:
    know(engine, prior=30)
    first, second = (Segment(tuple(some_tokens(90, seed=seed)), "text") for seed in (1, 2))
    engine.generate([Segment(ROLE_A), first, second, Segment(TAIL)], SAMPLING)
    return dict(engine.generate([Segment(ROLE_B), second, first, Segment(TAIL)], SAMPLING, policy=POLICY).usage.reasons)


def immovable(engine: Engine) -> dict[str, int]:
    know(engine, prior=30)
    engine.reuse.parts.planner.immovable = "its keys are of another kind"
    return served(engine, POLICY)[2]


def no_anchors(engine: Engine) -> dict[str, int]:
    know(engine, prior=30)
    return served(engine, replace(POLICY, rungs=(Rung("token"),)))[2]


def cost(engine: Engine) -> dict[str, int]:
    know(engine, prior=30)
    engine.reuse.parts.cost.model = CostModel(pass_s=0.0, row_s=1.0, pair_s=0.0, move_s=2.0)
    return served(engine, POLICY)[2]


def out_of_distribution(engine: Engine) -> dict[str, int]:
    earn(engine, LOOSE)
    rewrite(engine, lambda found: measured_as(found, distance=0.0))
    return served(engine, replace(LOOSE, rungs=(Rung("token"),)))[2]


def escalated(engine: Engine) -> dict[str, int]:
    earn(engine, LOOSE)
    rewrite(engine, lambda found: measured_as(found, residual=0.0))
    return served(engine, replace(LOOSE, rungs=(Rung("token", 0.4), Rung("token", 0.2))))[2]


def source_risk(engine: Engine) -> dict[str, int]:
    know(engine, prior=30)
    ask(engine, ROLE_A, 1, EXACT)
    with engine.context(prompt(ROLE_B, 1), policy=POLICY) as context:  # what stands behind it, nobody has foreseen
        context.extend(prompt((), 2)[1:])
        return dict(engine.generate([*prompt(ROLE_A, 1), *prompt((), 2)[1:]], SAMPLING, policy=POLICY).usage.reasons)


def failed(engine: Engine) -> dict[str, int]:
    know(engine, prior=30)

    def fails(*_: object) -> None:
        raise RuntimeError("no such operation")

    engine.reuse.parts.estimators["rotate"]._ops = type("Ops", (), {"rotate": fails})()  # type: ignore[attr-defined]
    return served(engine, POLICY)[2]


def rung(engine: Engine) -> dict[str, int]:
    know(engine, prior=30)
    return served(engine, replace(POLICY, rungs=TURNED[:1]))[2]


WAYS: dict[Reason, Callable[[Engine], dict[str, int]]] = {
    Reason.NO_SOURCE: no_source,
    Reason.DISPLACED: displaced,
    Reason.IMMOVABLE: immovable,
    Reason.NO_ANCHORS: no_anchors,
    Reason.COST: cost,
    Reason.OUT_OF_DISTRIBUTION: out_of_distribution,
    Reason.ESCALATED: escalated,
    Reason.SOURCE_RISK: source_risk,
    Reason.FAILED: failed,
    Reason.RUNG: rung,
}


@pytest.mark.parametrize("reason", WAYS)
def test_every_reason_comes_about(learning: Engine, reason: Reason) -> None:
    """Those that are not here: in the tests of levels above, of the cache, and of a full pool."""
    reasons = WAYS[reason](learning)
    expected = {Reason.ESCALATED: 95, Reason.OUT_OF_DISTRIBUTION: 95, Reason.FAILED: 129, Reason.RUNG: 27}
    assert reasons.get(reason.value) == expected.get(reason, 90), reasons


def test_what_waits_for_a_source_would_be_allowed_to_move_it(learning: Engine) -> None:
    """Whoever cannot move it anyway is admitted at once: both prompts then meet in one pass."""
    for num_pairs in (0, 30):
        know(learning, prior=num_pairs)
        with learning.lock:
            handles = [
                learning.submit(prompt(role, 50 + num_pairs), SAMPLING, policy=POLICY) for role in (ROLE_A, ROLE_B)
            ]
        usages = [handle.result(PATIENCE_S).usage for handle in handles]
        assert [usage.aligned_tokens for usage in usages] == [0, 90 if num_pairs else 0]


@pytest.mark.parametrize(("divergence", "num_moved"), [(0.2, 180), (0.3, 90)])
def test_the_prior_takes_approximate_sources_while_both_risks_are_within_the_bound(
    learning: Engine, divergence: float, num_moved: int
) -> None:
    """Bug: chains of moved text were served on pairs that had exact sources, and broke the bound most of the time."""
    know(learning, prior=30, divergence=divergence)
    ask(learning, ROLE_A, 1, EXACT)
    question, answer = prompt(ROLE_B, 1)[1], prompt((), 2)[1]
    learning.generate([Segment(ROLE_B), question, answer, Segment(TAIL)], SAMPLING, policy=POLICY)
    (rendition,) = renditions_by(learning, answer)
    assert rendition.risk == divergence
    read = [Segment(ROLE_C), question, answer, Segment(TAIL)]
    usage = learning.generate(read, SAMPLING, policy=POLICY).usage
    assert usage.aligned_tokens == num_moved
    assert usage.reasons.get("source_risk", 0) == 180 - num_moved
    assert usage.approximation is not None
    assert usage.approximation.predicted == pytest.approx(2 * divergence if num_moved == 180 else divergence)


def test_a_safer_rung_makes_room_for_what_a_source_is_off_by(learning: Engine) -> None:
    with learning.lock:
        for _ in range(30):
            nats = dict(zip(TURNED, (0.05, 0.1, 0.3), strict=True))
            learning.reuse.parts.book.prior.add(Pair({rung: Measured(nats[rung], 10.0) for rung in TURNED}))
        learning.reuse.parts.book.admit_prior(learning.namespace())
    ask(learning, ROLE_A, 1, EXACT)
    question, answer = prompt(ROLE_B, 1)[1], prompt((), 2)[1]
    first = learning.generate([Segment(ROLE_B), question, answer, Segment(TAIL)], SAMPLING, policy=POLICY).usage
    second = learning.generate([Segment(ROLE_C), question, answer, Segment(TAIL)], SAMPLING, policy=POLICY).usage
    assert first.approximation is not None
    assert second.approximation is not None
    assert (first.approximation.rung, first.approximation.predicted) == (str(TURNED[2]), 0.3)
    assert (second.approximation.rung, second.approximation.predicted) == (str(TURNED[1]), pytest.approx(0.4))
    assert "source_risk" not in second.reasons


def test_where_own_traffic_decides_twice_the_bound_may_be_at_risk(learning: Engine) -> None:
    know(learning, pool=30, divergence=0.3)
    ask(learning, ROLE_A, 1, EXACT)
    question, answer = prompt(ROLE_B, 1)[1], prompt((), 2)[1]
    learning.generate([Segment(ROLE_B), question, answer, Segment(TAIL)], SAMPLING, policy=POLICY)
    read = [Segment(ROLE_C), question, answer, Segment(TAIL)]
    assert learning.generate(read, SAMPLING, policy=POLICY).usage.aligned_tokens == 180


def test_requests_count_for_their_reader_and_questions_about_them_do_not(learning: Engine) -> None:
    know(learning, prior=30)
    ask(learning, ROLE_A, 1, EXACT)
    assert learning.explain(prompt(ROLE_B, 1), policy=POLICY).share == 0.0
    assert learning.reuse.parts.book.find(learning.namespace(), READER.digest) is None
    ask(learning, ROLE_B, 1, POLICY)
    standing = learning.reuse.parts.book.find(learning.namespace(), READER.digest)
    assert standing is not None
    assert (standing.num_requests, standing.num_approximated) == (1, 1)
