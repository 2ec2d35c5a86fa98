"""Levels: whose pairs decide what a reader's request may be served with.

What is known is pooled in three levels, from the most specific to the least: the reader's `own` pairs, those of all
readers of the tenant (`pool`), and those that ship with the model (`prior`). Which level decides is chosen by counts of
pairs and by debts (`align.watch`), never by what pairs show, so choosing costs nothing of the promise. What each
promises, over the draw of its pairs and of a request like them (exchangeable with them):

- own: P(accepted and divergence > epsilon) <= delta for this reader's requests;
- pool: the same over the mix of the tenant's readers that the pairs were drawn from, not reader by reader; of prompts
  whose sources had read all that stands before them, and of the others, each by itself;
- prior: the same over the mix of workloads that it was measured on, for kinds of sources by themselves (`kinds_at`),
  and nothing about other workloads. So a caller may ask for more (`ReusePolicy.basis`).

A `Watch` goes with each reader, level and bound; at pool and prior it lies within one over all requests of the tenant
at this level. Knows no engine and no pages. Guarded by its owner's lock.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Calibration, Pair, SourcesRead, pairs_needed
from kvcomm.align.importance import HeadFit
from kvcomm.align.ladder import TURNED, Ladder
from kvcomm.align.readers import Reader
from kvcomm.align.standings import LEVELS, YOUNG_AUDITS, Audit, Level, Pairs, Standing, Watches
from kvcomm.align.watch import Watch

MAX_READERS = 1000
"""Of a tenant; the one used longest ago is forgotten."""
MAX_POOL_PAIRS = 600
"""The newest ones; older ones were measured with fewer anchors."""


_NOBODY = Reader("")
"""No reader in particular."""


class Grounds(NamedTuple):
    """On what a request may be served with moved text.

    Attributes:
        level: whose pairs decide.
        calibration: these pairs, along the ladder that is to be used.
        watch: over this reader's requests at this level; says by which delta the rung is chosen.
    """

    level: Level
    calibration: Calibration
    watch: Watch

    @property
    def rung_index(self) -> int | None:
        """Index of the rung that the request may be served at; None: exactly only."""
        return self.calibration.choose(self.watch.bound.max_divergence, self.watch.working_delta)

    @property
    def tried(self) -> int | None:
        """Index of the rung whose outcome `Watch.would_give` wants of a prompt that was computed exactly.

        It is `rung_index`, or where there is none the one that the caller's own delta would choose: so the working
        delta comes back up where what it comes back to holds. None where the pairs are not good enough for either.
        """
        index = self.rung_index
        return self.calibration.choose(*self.watch.bound) if index is None else index


class Count(NamedTuple):
    """Pairs of one level along one ladder, and how many it takes until the level decides."""

    level: Level
    ladder: Ladder
    num_pairs: int
    num_needed: int


class KeptWatch(NamedTuple):
    """A watch with its place: `reader` is a digest, empty for watches over all of a tenant's requests at a level."""

    level: Level
    reader: str
    watch: Watch


class Knowledge(NamedTuple):
    """All that is known of a tenant's readers, to be kept in a file."""

    readers: tuple[tuple[Reader, tuple[Pair, ...]], ...] = ()
    watches: tuple[KeptWatch, ...] = ()
    head_weights: tuple[float, ...] | None = None

    @property
    def num_pairs(self) -> int:
        """Pairs of all readers."""
        return sum(len(pairs) for _, pairs in self.readers)

    def without_anchors(self) -> Knowledge:
        """The same without what was measured by rungs that need anchors."""
        readers = tuple((reader, tuple(_turned(pair) for pair in pairs)) for reader, pairs in self.readers)
        return self._replace(readers=readers)


@dataclass(eq=False)
class _Tenant:
    """One namespace. `pool` holds the newest pairs of all readers; `has_prior`: the prior may decide, too."""

    standings: OrderedDict[str, Standing] = field(default_factory=OrderedDict)
    pool: Pairs = field(default_factory=lambda: Pairs(MAX_POOL_PAIRS))
    watches: Watches = field(default_factory=Watches)
    heads: HeadFit = field(default_factory=HeadFit)
    has_prior: bool = False


class ReaderBook:
    """Every reader, tenant by tenant, and the prior of the model."""

    def __init__(self, prior: Iterable[Pair] = (), head_weights: tuple[float, ...] | None = None) -> None:
        """Make one.

        Args:
            prior: pairs that ship with the model; none: there is no such level.
            head_weights: that ship with it, see `HeadFit`.
        """
        self.head_weights = head_weights
        self.prior = Pairs()
        for pair in prior:
            self.prior.add(pair)
        self._tenants: dict[str, _Tenant] = {}

    def standing(self, namespace: str, reader: Reader) -> Standing:
        """What is known of a reader; it is remembered from now on."""
        standings = self._tenant(namespace).standings
        found = standings.pop(reader.digest, None) or Standing(reader)
        standings[reader.digest] = found
        if len(standings) > MAX_READERS:
            standings.popitem(last=False)
        return found

    def find(self, namespace: str, digest: str) -> Standing | None:
        """What is known of the reader with this digest, if anything."""
        tenant = self._tenants.get(namespace)
        return None if tenant is None else tenant.standings.get(digest)

    def standings(self, namespace: str) -> list[Standing]:
        """Every reader of a tenant, the one used last at the end."""
        tenant = self._tenants.get(namespace)
        return [] if tenant is None else list(tenant.standings.values())

    def pool(self, namespace: str) -> tuple[Pair, ...]:
        """The pairs of all readers of a tenant, the oldest first."""
        tenant = self._tenants.get(namespace)
        return () if tenant is None else tuple(tenant.pool)

    def usual_sources(self, namespace: str) -> SourcesRead | None:
        """How much sources had read in most pooled pairs; None: there are no such pairs.

        What a reader's sources will be like that has no pairs yet: those of the tenant's prompts, or of the prior's.
        """
        for level in (Level.POOL, Level.PRIOR):
            kinds = Counter(pair.sources.read for pair in self._pairs(namespace, _NOBODY, level))
            if kinds:
                return max(SourcesRead, key=lambda kind: kinds[kind])
        return None

    def heads(self, namespace: str) -> HeadFit:
        """What exact answers of a tenant tell about heads; all readers share it, as heads are the model's."""
        return self._tenant(namespace).heads

    def add(self, namespace: str, reader: Reader, pair: Pair) -> None:
        """A prompt of a reader has been measured: it counts for its own level and for the pool."""
        self.standing(namespace, reader).pairs.add(pair)
        self._tenant(namespace).pool.add(pair, reader.digest)

    def counts(
        self,
        namespace: str,
        reader: Reader,
        ladders: Iterable[Ladder],
        bound: Bound,
        levels: Iterable[Level] = LEVELS,
        *,
        read: SourcesRead | None = None,
    ) -> list[Count]:
        """What each level has for a reader, in the order in which they are asked: level by level, ladder by ladder.

        A reader that is not known has no pairs, and is not known afterwards either.

        Args:
            read: how much the sources of a prompt have read; of pooled pairs only those of a kind with it count, see
                `kinds_at`. None: all count.
        """
        ladders = tuple(ladders)
        return [
            Count(
                level,
                ladder,
                self._calibration(namespace, reader, level, ladder, read).num_pairs,
                _needed(level, bound),
            )
            for level in levels
            for ladder in ladders
        ]

    def grounds(
        self,
        namespace: str,
        reader: Reader,
        ladders: Iterable[Ladder],
        bound: Bound,
        levels: Iterable[Level] = LEVELS,
        *,
        read: SourcesRead | None = None,
    ) -> Grounds | None:
        """What decides about a request: the most specific level with enough pairs.

        Enough are those that allow a violation among them. Where no level has so many, it is the one with most, if that
        is enough for a bound that none of them breaks. Where that level owes so much that it lets nothing pass, a more
        specific one decides if it can, and never a less specific one.

        Args:
            ladders: that could be used for the request, the one that costs least first.
            levels: that the caller accepts, the most specific first.
            read: see `counts`.

        Returns:
            None where no level that holds has enough.
        """
        least = pairs_needed(bound.delta)
        counts = [
            count
            for count in self.counts(namespace, reader, ladders, bound, levels, read=read)
            if count.num_pairs >= least and not self.watch(namespace, reader, count.level, bound).is_tripped
        ]
        if not counts:
            return None
        most = max(counts, key=lambda count: count.num_pairs)
        best = next((count for count in counts if count.num_pairs >= count.num_needed), most)
        if not self._lets_any(namespace, reader, best, bound):
            nearer = [each for each in counts if LEVELS.index(each.level) < LEVELS.index(best.level)]
            able = [each for each in nearer if self._lets_any(namespace, reader, each, bound)]
            best = max(able, key=lambda count: count.num_pairs, default=best)
        calibration = self._calibration(namespace, reader, best.level, best.ladder, read)
        return Grounds(best.level, calibration, self.watch(namespace, reader, best.level, bound))

    def is_stopped(self, namespace: str, reader: Reader, level: Level, bound: Bound) -> bool:
        """Whether what was found lets a level accept nothing now: the tenant's requests, or at `own` the reader's."""
        watch = self.watch(namespace, reader, level, bound)
        widest = watch.within or watch
        return widest.is_tripped or not widest.lets_any(len(self._pairs(namespace, reader, level)))

    def is_barred(self, namespace: str, reader: Reader, level: Level, bound: Bound) -> bool:
        """Whether a breaker has tripped that keeps a level from deciding about a reader."""
        return self.watch(namespace, reader, level, bound).is_tripped

    def find_watch(self, namespace: str, reader: Reader, level: Level, bound: Bound) -> Watch | None:
        """The watch over a reader's requests at a level; None: the reader is not known."""
        known = self.find(namespace, reader.digest) is not None
        return self.watch(namespace, reader, level, bound) if known else None

    def watch(self, namespace: str, reader: Reader, level: Level, bound: Bound) -> Watch:
        """The watch over a reader's requests at a level, within that over all of the tenant's at this level.

        Of a reader that is not known it is a fresh one, and the reader is not known afterwards either.
        """
        standing = self.find(namespace, reader.digest)
        found = Watch(bound) if standing is None else standing.watches.get(level, bound)
        found.within = None if level is Level.OWN else self._tenant(namespace).watches.get(level, bound)
        return found

    def watches(self, namespace: str) -> Iterator[tuple[Level, Reader | None, Watch]]:
        """Every watch of a tenant; those over all its requests at a level belong to no single reader."""
        tenant = self._tenants.get(namespace)
        if tenant is None:
            return
        for level, watch in tenant.watches:
            yield level, None, watch
        for standing in self.standings(namespace):
            for level, watch in standing.watches:
                yield level, standing.reader, watch

    def audited(self, namespace: str, reader: Reader, audit: Audit) -> bool:
        """Count an audit; returns whether a breaker trips with it, of the reader or of all at the level.

        A reader of which one trips is not served by that level any more, and where all do, nobody is. Pairs of the
        tenant's own traffic are of another time then: they are forgotten and the level begins anew.
        """
        standing = self.standing(namespace, reader)
        standing.audits.append(audit)
        standing.num_audited += 1
        watch = self.watch(namespace, reader, audit.level, audit.bound)
        trips = watch.audited(audit.divergence)
        if audit.level is Level.OWN and trips:
            self.restart(namespace, reader)
        elif audit.level is Level.POOL and watch.within is not None and watch.within.is_tripped:
            self._restart_pool(namespace)
        return trips

    def restart(self, namespace: str, reader: Reader) -> None:
        """Forget a reader's pairs, in the pool too, and what was watched about its own level; it is young again."""
        self._tenant(namespace).pool.drop(reader.digest)
        standing = self.standing(namespace, reader)
        standing.pairs.clear()
        standing.watches.drop(Level.OWN)
        standing.num_watched = standing.num_approximated + YOUNG_AUDITS

    def admit_prior(self, namespace: str) -> None:
        """Let the prior decide about a tenant: it was measured on the weights that its requests are computed with."""
        tenant = self._tenant(namespace)
        if not tenant.has_prior:
            tenant.has_prior = True
            if self.head_weights is not None and not tenant.heads.num_prompts:
                tenant.heads = HeadFit(self.head_weights)

    def knowledge(self, namespace: str) -> Knowledge:
        """A copy of all that is known of a tenant's readers; follows nothing."""
        tenant = self._tenant(namespace)
        watches = [KeptWatch(level, "", watch.alone()) for level, watch in tenant.watches]
        for digest, standing in tenant.standings.items():
            watches += [KeptWatch(level, digest, watch.alone()) for level, watch in standing.watches]
        readers = tuple((standing.reader, tuple(standing.pairs)) for standing in tenant.standings.values())
        return Knowledge(readers, tuple(watches), tenant.heads.weights)

    def put(self, namespace: str, knowledge: Knowledge) -> None:
        """Take over what was kept, in place of what is known of the same readers; their pairs join the pool."""
        tenant = self._tenant(namespace)
        for reader, pairs in knowledge.readers:
            tenant.pool.drop(reader.digest)
            tenant.standings[reader.digest] = Standing(reader)
            for pair in pairs:
                self.add(namespace, reader, pair)
        for kept in knowledge.watches:
            if not kept.reader:
                tenant.watches.put(kept.level, kept.watch)
            elif kept.reader in tenant.standings:
                tenant.standings[kept.reader].watches.put(kept.level, kept.watch)
        if knowledge.head_weights is not None:
            tenant.heads = HeadFit(knowledge.head_weights)

    def forget(self, namespace: str) -> None:
        """Forget every reader of a tenant."""
        self._tenants.pop(namespace, None)

    def _lets_any(self, namespace: str, reader: Reader, count: Count, bound: Bound) -> bool:
        return self.watch(namespace, reader, count.level, bound).lets_any(count.num_pairs)

    def _calibration(
        self, namespace: str, reader: Reader, level: Level, ladder: Ladder, read: SourcesRead | None
    ) -> Calibration:
        return self._pairs(namespace, reader, level).along(ladder, kinds_at(level, read))

    def _restart_pool(self, namespace: str) -> None:
        """Forget the pool of a tenant and what was watched about it; readers that it did not suit stay without."""
        tenant = self._tenant(namespace)
        tenant.pool.clear()
        tenant.watches.drop(Level.POOL)

    def _pairs(self, namespace: str, reader: Reader, level: Level) -> Pairs:
        if level is Level.PRIOR:
            admitted = namespace in self._tenants and self._tenants[namespace].has_prior
            return self.prior if admitted else Pairs()
        if level is Level.POOL:
            tenant = self._tenants.get(namespace)
            return Pairs() if tenant is None else tenant.pool
        standing = self.find(namespace, reader.digest)
        return Pairs() if standing is None else standing.pairs

    def _tenant(self, namespace: str) -> _Tenant:
        return self._tenants.setdefault(namespace, _Tenant())


def kinds_at(level: Level, read: SourcesRead | None) -> frozenset[SourcesRead] | None:
    """Kinds of sources whose pairs decide about a prompt with sources of one kind; None: all.

    A reader's own pairs are of one mix already, and few. Others are told apart by whether all had been read. In a prior
    what stands between is the worst: it is judged by its like alone, so that nothing milder lets it pass, and counts
    for documents that nobody has read together, which are of few workloads, as well.
    """
    if read is None or level is Level.OWN:
        return None
    if read is SourcesRead.ALL or (level is Level.PRIOR and read is SourcesRead.SOME):
        return frozenset({read})
    return frozenset({SourcesRead.SOME, SourcesRead.NONE})


def _needed(level: Level, bound: Bound) -> int:
    """Pairs from which on a level decides although others have more."""
    return pairs_needed(bound.delta if level is Level.PRIOR else bound.delta / 2)


def _turned(pair: Pair) -> Pair:
    """A pair without what rungs gave that need anchors."""
    measured = {rung: each for rung, each in pair.measured.items() if rung.estimator == TURNED[0].estimator}
    return Pair(measured, {}, pair.sources)
