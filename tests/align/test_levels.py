"""Levels: which one decides, what trips whom, and that nothing meets that should not; against a naive model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcomm.align import levels, standings
from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Measured, Pair, Sources, SourcesRead
from kvcomm.align.ladder import Ladder, Rung
from kvcomm.align.levels import ReaderBook
from kvcomm.align.readers import Reader
from kvcomm.align.standings import LEVELS, YOUNG_AUDITS, Audit, Level, Pairs, Standing

CHEAP: Ladder = (Rung("token", 0.3), Rung("token", 0.0))
SURE: Ladder = (Rung("rotate", 0.5),)
LADDERS = (CHEAP, SURE)
BOUND = Bound(0.05, 0.1)
STRICT = Bound(0.02, 0.05)
ONE, OTHER = Reader("1" * 64), Reader("2" * 64)


def pair(divergence: float = 0.01, *ladders: Ladder) -> Pair:
    return Pair({rung: Measured(divergence) for ladder in ladders or LADDERS for rung in ladder})


def book(own: int = 0, pool: int = 0, prior: int = 0) -> ReaderBook:
    """With so many pairs of `ONE`, of all readers, and shipped."""
    made = ReaderBook([pair() for _ in range(prior)])
    for namespace in "ab" if prior else "":
        made.admit_prior(namespace)
    for index in range(pool):
        made.add("a", ONE if index < own else OTHER, pair())
    return made


def audit(divergence: float, level: Level, bound: Bound = BOUND) -> Audit:
    return Audit(0.0, divergence, 0.04, bound, level)


def deciding(made: ReaderBook, levels: Sequence[Level] = LEVELS, bound: Bound = BOUND) -> Level | None:
    grounds = made.grounds("a", ONE, LADDERS, bound, levels)
    return None if grounds is None else grounds.level


@pytest.mark.parametrize(
    ("own", "pool", "prior", "level"),
    [
        (0, 0, 0, None),
        (8, 8, 8, None),
        (0, 0, 9, Level.PRIOR),
        (9, 9, 0, Level.OWN),
        (9, 10, 0, Level.POOL),
        (9, 10, 9, Level.PRIOR),
        (18, 18, 300, Level.PRIOR),
        (18, 19, 300, Level.POOL),
        (19, 19, 300, Level.OWN),
        (19, 300, 300, Level.OWN),
        (8, 300, 8, Level.POOL),
    ],
)
def test_counts_decide(own: int, pool: int, prior: int, level: Level | None) -> None:
    assert deciding(book(own, pool, prior)) == level


def test_what_pairs_show_decides_nothing() -> None:
    made = book(19, 300, 300)
    for _ in range(50):
        made.add("a", ONE, pair(9.0))
    grounds = made.grounds("a", ONE, LADDERS, BOUND)
    assert grounds is not None
    assert grounds.level is Level.OWN
    assert grounds.rung_index is None
    assert grounds.tried is None


def test_a_caller_chooses_the_least_level() -> None:
    made = book(18, 18, 300)
    assert deciding(made, (Level.OWN,)) is Level.OWN
    assert deciding(made, (Level.OWN, Level.POOL)) is Level.OWN
    assert deciding(book(0, 30, 0), (Level.OWN,)) is None
    assert deciding(made, ()) is None


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (Level.OWN, (30, 30, 30)),
        (Level.POOL, (9, 21, 21)),
        (Level.PRIOR, (9, 10, 21)),
    ],
)
def test_pairs_of_unlike_sources_are_told_apart_where_they_are_of_unlike_traffic(
    level: Level, expected: tuple[int, int, int]
) -> None:
    """Bug: what agents say to each other was served at a rung that only documents keep the bound at."""
    unread = (0,) * 9 + (1,) * 10 + (2,) * 11
    pairs = [replace(pair(), sources=Sources(num_segments=2, num_unread=number)) for number in unread]
    made = ReaderBook(pairs)
    made.admit_prior("a")
    for each in pairs:
        made.add("a", ONE, each)
    kinds = (SourcesRead.ALL, SourcesRead.SOME, SourcesRead.NONE)
    counts = [made.counts("a", ONE, (SURE,), BOUND, (level,), read=kind)[0].num_pairs for kind in kinds]
    assert tuple(counts) == expected
    assert made.usual_sources("a") is SourcesRead.NONE
    assert made.counts("a", ONE, (SURE,), BOUND, (level,))[0].num_pairs == 30


def test_a_stricter_bound_needs_more_pairs() -> None:
    assert deciding(book(18, 18), bound=STRICT) is None
    assert deciding(book(19, 19), bound=STRICT) is Level.OWN
    assert deciding(book(38, 300), bound=STRICT) is Level.POOL
    assert deciding(book(39, 300), bound=STRICT) is Level.OWN


def test_the_ladder_that_costs_least_and_has_enough_pairs() -> None:
    made = ReaderBook()
    for _ in range(18):
        made.add("a", ONE, pair())
    for _ in range(5):
        made.add("a", ONE, pair(0.01, SURE))
    grounds = made.grounds("a", ONE, LADDERS, BOUND)
    assert grounds is not None
    assert grounds.calibration.ladder == SURE
    made.add("a", ONE, pair())
    grounds = made.grounds("a", ONE, LADDERS, BOUND)
    assert grounds is not None
    assert grounds.calibration.ladder == CHEAP
    assert made.grounds("a", ONE, (), BOUND) is None


def test_counts_tell_what_is_missing_and_remember_nobody() -> None:
    made = book(7, 12, 30)
    told = made.counts("a", ONE, (CHEAP,), STRICT)
    assert [(each.level, each.num_pairs, each.num_needed) for each in told] == [
        (Level.OWN, 7, 39),
        (Level.POOL, 12, 39),
        (Level.PRIOR, 30, 19),
    ]
    stranger = Reader("3" * 64)
    assert [each.num_pairs for each in made.counts("b", stranger, LADDERS, BOUND, (Level.OWN, Level.POOL))] == [0] * 4
    assert made.find("a", stranger.digest) is None
    assert made.standings("b") == []


def test_the_working_delta_chooses_the_rung() -> None:
    made = ReaderBook()
    for index in range(29):
        made.add("a", ONE, Pair({CHEAP[0]: Measured(0.01), CHEAP[1]: Measured(0.09 if index < 2 else 0.01)}))
    grounds = made.grounds("a", ONE, (CHEAP,), BOUND)
    assert grounds is not None
    assert (grounds.rung_index, grounds.tried) == (1, 1)
    made.audited("a", ONE, audit(0.09, Level.OWN))
    assert (grounds.rung_index, grounds.tried) == (0, 0)
    made.audited("a", ONE, audit(0.09, Level.OWN))
    assert grounds.watch.working_delta < 1 / 30
    assert (grounds.rung_index, grounds.tried) == (None, 1)
    for _ in range(20):
        grounds.watch.would_give(0.01)
    assert (grounds.rung_index, grounds.tried) == (1, 1)


def test_a_reader_whose_own_level_trips_begins_anew() -> None:
    made = book(40, 60)
    standing = made.standing("a", ONE)
    standing.num_approximated = 100
    assert not standing.is_young
    trips = [made.audited("a", ONE, audit(0.09, Level.OWN)) for _ in range(4)]
    assert trips == [False, False, False, True]
    assert len(standing.pairs) == 0
    assert len(made.pool("a")) == 20
    assert len(made.standing("a", OTHER).pairs) == 20
    assert standing.is_young
    standing.num_approximated += YOUNG_AUDITS
    assert standing.is_young
    standing.num_approximated += 1
    assert not standing.is_young
    assert deciding(made) is Level.POOL
    for _ in range(19):
        made.add("a", ONE, pair())
    assert deciding(made) is Level.OWN
    assert made.watch("a", ONE, Level.OWN, BOUND).working_delta == BOUND.delta


def test_a_reader_that_the_pool_does_not_suit_is_left_out_alone() -> None:
    made = book(0, 40, 30)
    for _ in range(60):
        assert not made.audited("a", OTHER, audit(0.01, Level.POOL))
    assert [made.audited("a", ONE, audit(0.09, Level.POOL)) for _ in range(4)] == [False, False, False, True]
    assert deciding(made) is Level.PRIOR
    assert len(made.pool("a")) == 40
    grounds = made.grounds("a", Reader("3" * 64), LADDERS, BOUND)
    assert grounds is not None
    assert grounds.level is Level.POOL


def test_a_pool_that_trips_begins_anew_while_own_levels_stay() -> None:
    made = book(20, 40)
    third = Reader("3" * 64)
    trips = [made.audited("a", reader, audit(0.09, Level.POOL)) for reader in (OTHER, third) for _ in range(2)]
    assert trips == [False, False, False, True]
    assert made.pool("a") == ()
    assert deciding(made) is Level.OWN
    assert made.grounds("a", third, LADDERS, BOUND) is None
    for _ in range(9):
        made.add("a", OTHER, pair())
    grounds = made.grounds("a", Reader("4" * 64), LADDERS, BOUND)
    assert grounds is not None
    assert grounds.level is Level.POOL
    assert grounds.watch.working_delta == BOUND.delta
    debtor = made.grounds("a", third, LADDERS, BOUND, (Level.POOL,))
    assert debtor is not None
    assert debtor.watch.working_delta < BOUND.delta  # what it owes is its own


def test_a_prior_that_trips_is_off_for_this_tenant_and_bound() -> None:
    made = book(0, 0, 30)
    for reader in (ONE, OTHER, ONE, OTHER):
        made.audited("a", reader, audit(0.09, Level.PRIOR))
    assert deciding(made) is None
    assert made.grounds("a", Reader("3" * 64), LADDERS, BOUND) is None
    assert made.grounds("a", ONE, LADDERS, STRICT) is not None
    assert made.grounds("b", ONE, LADDERS, BOUND) is not None
    assert len(made.prior) == 30


def test_a_debt_of_all_readers_is_each_ones() -> None:
    made = book(0, 0, 30)
    made.audited("a", OTHER, audit(0.09, Level.PRIOR))
    assert made.watch("a", ONE, Level.PRIOR, BOUND).working_delta == pytest.approx(0.055)
    assert made.watch("a", ONE, Level.OWN, BOUND).working_delta == BOUND.delta
    assert made.watch("b", ONE, Level.PRIOR, BOUND).working_delta == BOUND.delta


def test_a_reader_forgotten_while_its_request_was_on_the_way_is_known_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "MAX_READERS", 1)
    made = book(19, 19)
    assert deciding(made) is Level.OWN
    made.standing("a", OTHER)
    assert made.find("a", ONE.digest) is None
    assert deciding(made, (Level.OWN,)) is None
    assert not made.audited("a", ONE, audit(0.01, Level.OWN))
    made.add("a", ONE, pair())
    assert made.standing("a", ONE).num_audited == 1
    assert len(made.standing("a", ONE).pairs) == 1


def test_a_tenant_that_is_forgotten_leaves_nothing() -> None:
    made = book(19, 40)
    made.audited("a", ONE, audit(0.09, Level.OWN))
    made.forget("a")
    made.forget("never seen")
    assert made.pool("a") == ()
    assert made.standings("a") == []
    assert [*made.watches("a")] == []
    assert not made.audited("a", ONE, audit(0.09, Level.OWN))


def test_watches_say_whose_they_are() -> None:
    made = book(19, 40, 30)
    made.grounds("a", ONE, LADDERS, BOUND)
    told = [(level, reader) for level, reader, _ in made.watches("a")]
    assert (Level.OWN, ONE) in told
    assert (Level.POOL, None) in told
    assert (Level.OWN, None) not in told


def test_a_prior_in_debt_leaves_the_decision_to_the_tenants_own_pairs() -> None:
    """Bug: a prior that had broken the bound decided on, against anything, while the pool had pairs enough."""
    made = book(0, 9, 30)
    assert deciding(made) is Level.PRIOR
    for _ in range(2):
        made.audited("a", OTHER, audit(0.09, Level.PRIOR))
    assert deciding(made) is Level.POOL
    assert deciding(book(0, 8, 30)) is Level.PRIOR
    for _ in range(5):  # and back, once exact prompts show that it would have kept the bound
        made.watch("a", ONE, Level.PRIOR, BOUND).would_give(0.01)
    assert deciding(made) is Level.PRIOR


def test_a_level_in_debt_is_never_overruled_by_a_less_specific_one() -> None:
    made = book(0, 19, 30)
    for _ in range(2):
        made.audited("a", ONE, audit(0.09, Level.POOL))
    assert deciding(made) is Level.POOL
    grounds = made.grounds("a", ONE, LADDERS, BOUND)
    assert grounds is not None
    assert (grounds.rung_index, grounds.tried) == (None, 1)


def test_a_level_is_stopped_when_nothing_is_accepted_on_it_of_anybody() -> None:
    made = book(0, 9, 30)
    assert not made.is_stopped("a", ONE, Level.PRIOR, BOUND)
    made.audited("a", ONE, audit(0.09, Level.PRIOR))
    made.audited("a", OTHER, audit(0.01, Level.PRIOR))
    assert not made.is_stopped("a", ONE, Level.PRIOR, BOUND)
    made.audited("a", OTHER, audit(0.09, Level.PRIOR))
    assert made.is_stopped("a", ONE, Level.PRIOR, BOUND)
    assert made.is_stopped("a", Reader("3" * 64), Level.PRIOR, BOUND)
    assert not made.is_stopped("b", ONE, Level.PRIOR, BOUND)
    assert not made.is_stopped("a", ONE, Level.POOL, BOUND)
    assert made.is_stopped("a", ONE, Level.OWN, BOUND)  # without pairs nothing is


def test_ever_new_bounds_readers_and_ladders_fill_no_memory() -> None:
    made = book(0, 0, 30)
    for index in range(2 * levels.MAX_READERS):
        made.add("a", Reader(f"{index:064d}"), pair())
    assert len(made.standings("a")) == levels.MAX_READERS
    assert len(made.pool("a")) == levels.MAX_POOL_PAIRS
    for index in range(300):
        bound = Bound(0.05 + index / 1000, 0.1)
        made.grounds("a", ONE, [(Rung("token", index / 1000),)], bound)
        made.grounds("a", ONE, LADDERS, bound)
        made.audited("a", ONE, audit(0.01, Level.PRIOR, bound))
        made.add("a", ONE, pair())
    standing = made.standing("a", ONE)
    assert len(standing.watches) == standings.MAX_WATCHES
    assert sum(reader is None for _, reader, _ in made.watches("a")) == standings.MAX_WATCHES
    assert len(standing.audits) == standings.MAX_AUDITS
    assert standing.num_audited == 300
    assert len(standing.pairs) == standings.MAX_OWN_PAIRS


def test_of_too_many_watches_the_one_used_longest_ago_goes() -> None:
    made = book(0, 0, 30)
    made.audited("a", ONE, audit(0.09, Level.PRIOR))
    for index in range(standings.MAX_WATCHES - 2):
        made.watch("a", ONE, Level.PRIOR, Bound(1 + index, 0.1))
    assert made.watch("a", ONE, Level.PRIOR, BOUND).debt > 0
    for index in range(standings.MAX_WATCHES):
        made.watch("a", ONE, Level.PRIOR, Bound(1000 + index, 0.1))
    assert made.watch("a", ONE, Level.PRIOR, BOUND).debt == 0


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9)), max_size=40), st.integers(1, 10))
def test_pairs_keep_the_newest_and_drop_a_readers(added: list[tuple[str, int]], room: int) -> None:
    found = Pairs(room)
    for reader, number in added:
        found.add(pair(number / 100), reader)
        assert found.along(SURE).num_pairs == len(found)
    kept = added[-room:]
    found.drop("a")
    assert [each.measured[SURE[0]].divergence for each in found] == [n / 100 for reader, n in kept if reader == "b"]
    assert found.along(SURE).num_pairs == len(found)
    found.clear()
    assert found.along(SURE).num_pairs == len(found) == 0


TENANTS = ("a", "b")
READERS = (ONE, OTHER)


class NaiveWatch:
    """A debt and a martingale in fractions, for one bound."""

    def __init__(self) -> None:
        self.debt = Fraction(0)
        self.ratios = [Fraction(1)] * 5
        self.tripped = False

    def move(self, violated: bool, *, is_audit: bool) -> bool:
        moved = max(Fraction(0), self.debt + violated - Fraction(1, 10))
        self.debt = moved if is_audit else min(moved, max(self.debt, Fraction(3)))
        if not is_audit:
            return False
        rates = [Fraction(3, 20), Fraction(1, 5), Fraction(3, 10), Fraction(1, 2), Fraction(11, 20)]
        for index, rate in enumerate(rates):
            self.ratios[index] *= rate * 10 if violated else (1 - rate) * Fraction(10, 9)
        trips = not self.tripped and sum(self.ratios) / 5 >= 100
        self.tripped = self.tripped or trips
        return trips


class AgainstANaiveModel(RuleBasedStateMachine):
    """Two tenants with two readers each, as plain lists and dicts that are never shared."""

    @initialize(num_prior=st.sampled_from([0, 8, 9, 40]))
    def begin(self, num_prior: int) -> None:
        self.num_prior = num_prior
        self.book = ReaderBook([pair() for _ in range(num_prior)])
        for tenant in TENANTS:
            self.book.admit_prior(tenant)
        self.own: dict[tuple[str, Reader], list[float]] = {(t, r): [] for t in TENANTS for r in READERS}
        self.pool: dict[str, list[tuple[Reader, float]]] = {tenant: [] for tenant in TENANTS}
        self.watched: dict[tuple[str, Reader | None, Level], NaiveWatch] = {}

    @rule(tenant=st.sampled_from(TENANTS), reader=st.sampled_from(READERS), broken=st.integers(0, 3))
    def learn(self, tenant: str, reader: Reader, broken: int) -> None:
        for divergence in [0.09] * (broken == 3) + [0.01] * 4:
            self.book.add(tenant, reader, pair(divergence))
            self.own[tenant, reader].append(divergence)
            self.pool[tenant].append((reader, divergence))

    @rule(
        tenant=st.sampled_from(TENANTS),
        reader=st.sampled_from(READERS),
        level=st.sampled_from(LEVELS),
        broken=st.lists(st.booleans(), min_size=1, max_size=4),
    )
    def audit(self, tenant: str, reader: Reader, level: Level, broken: list[bool]) -> None:
        for violated in broken:
            trips = self.book.audited(tenant, reader, audit(0.09 if violated else 0.01, level))
            expected = [watch.move(violated, is_audit=True) for watch in self.naive(tenant, reader, level)]
            assert trips == any(expected)
            if trips and level is Level.OWN:
                self.restart_naively(tenant, reader)
            if level is Level.POOL and expected[1]:
                self.pool[tenant] = []
                del self.watched[tenant, None, Level.POOL]

    @rule(tenant=st.sampled_from(TENANTS), reader=st.sampled_from(READERS), broken=st.booleans())
    def measure(self, tenant: str, reader: Reader, broken: bool) -> None:
        self.book.standing(tenant, reader)  # who is not known has no watch to be told
        grounds = self.book.grounds(tenant, reader, (SURE,), BOUND)
        if grounds is None:
            return
        grounds.watch.would_give(0.09 if broken else 0.01)
        for watch in self.naive(tenant, reader, grounds.level):
            watch.move(broken, is_audit=False)

    @rule(tenant=st.sampled_from(TENANTS), reader=st.sampled_from(READERS))
    def restart(self, tenant: str, reader: Reader) -> None:
        self.book.restart(tenant, reader)
        self.restart_naively(tenant, reader)

    @rule(tenant=st.sampled_from(TENANTS))
    def forget(self, tenant: str) -> None:
        self.book.forget(tenant)
        self.book.admit_prior(tenant)  # as its next request does
        self.pool[tenant] = []
        for reader in READERS:
            self.own[tenant, reader] = []
        self.watched = {key: watch for key, watch in self.watched.items() if key[0] != tenant}

    @invariant()
    def every_reader_is_served_as_the_model_says(self) -> None:
        for tenant in TENANTS:
            for reader in READERS:
                grounds = self.book.grounds(tenant, reader, (SURE,), BOUND)
                level = self.level(tenant, reader)
                assert (None if grounds is None else grounds.level) == level
                if grounds is None or level is None:
                    continue
                seen = self.divergences(tenant, reader, level)
                debt = max(watch.debt for watch in self.naive(tenant, reader, level))
                risk = Fraction(sum(each > 0.05 for each in seen) + 1, len(seen) + 1)
                assert grounds.calibration.num_pairs == len(seen)
                assert (grounds.rung_index == 0) == (risk <= Fraction(1, 10) * (1 - debt / 2))
                assert (grounds.tried == 0) == (risk <= Fraction(1, 10))
                assert math.isclose(grounds.watch.working_delta, 0.1 * (1 - float(debt) / 2), abs_tol=1e-8)

    @invariant()
    def tenants_have_their_own_pools(self) -> None:
        for tenant in TENANTS:
            pooled = [each.measured[SURE[0]].divergence for each in self.book.pool(tenant)]
            assert pooled == [divergence for _, divergence in self.pool[tenant]][-levels.MAX_POOL_PAIRS :]

    def level(self, tenant: str, reader: Reader) -> Level | None:
        counts = {
            level: len(self.divergences(tenant, reader, level))
            for level in LEVELS
            if not any(watch.tripped for watch in self.naive(tenant, reader, level))
        }
        counts = {level: count for level, count in counts.items() if count >= 9}
        enough = [level for level, count in counts.items() if count >= (9 if level is Level.PRIOR else 19)]
        chosen = next(iter(enough), max(counts, key=lambda level: counts[level], default=None))
        if chosen is None or self.lets_any(tenant, reader, chosen, counts[chosen]):
            return chosen
        nearer = [level for level in counts if LEVELS.index(level) < LEVELS.index(chosen)]
        able = [level for level in nearer if self.lets_any(tenant, reader, level, counts[level])]
        return max(able, key=lambda level: counts[level], default=chosen)

    def lets_any(self, tenant: str, reader: Reader, level: Level, count: int) -> bool:
        debt = max(watch.debt for watch in self.naive(tenant, reader, level))
        return Fraction(1, count + 1) <= Fraction(1, 10) * (1 - debt / 2)

    def divergences(self, tenant: str, reader: Reader, level: Level) -> list[float]:
        if level is Level.PRIOR:
            return [0.01] * self.num_prior
        if level is Level.POOL:
            return [divergence for _, divergence in self.pool[tenant]][-levels.MAX_POOL_PAIRS :]
        return self.own[tenant, reader][-standings.MAX_OWN_PAIRS :]

    def naive(self, tenant: str, reader: Reader, level: Level) -> list[NaiveWatch]:
        owners = [reader] if level is Level.OWN else [reader, None]
        return [self.watched.setdefault((tenant, owner, level), NaiveWatch()) for owner in owners]

    def restart_naively(self, tenant: str, reader: Reader) -> None:
        self.own[tenant, reader] = []
        self.pool[tenant] = [each for each in self.pool[tenant] if each[0] != reader]
        self.watched.pop((tenant, reader, Level.OWN), None)


TestAgainstANaiveModel = AgainstANaiveModel.TestCase


def test_a_reader_is_young_for_its_first_approximate_requests() -> None:
    standing = Standing(ONE)
    young = []
    for _ in range(YOUNG_AUDITS + 2):
        standing.num_approximated += 1
        young.append(standing.is_young)
    assert young == [True] * YOUNG_AUDITS + [False] * 2
