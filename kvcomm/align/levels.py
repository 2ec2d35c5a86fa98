"""Levels: whose pairs decide what a reader's request may be served with.

What is known is pooled in three levels, from the most specific to the least: the reader's `own` pairs, those of all
readers of the tenant (`pool`), and those that ship with the model (`prior`). Which level decides is chosen by counts of
pairs and never by what they show, so choosing costs nothing of the promise. What each promises, over the draw of its
pairs and of a request like them (exchangeable with them):

- own: P(divergence > epsilon) <= delta among this reader's requests;
- pool: the same over the mix of the tenant's readers that the pairs were drawn from, not reader by reader;
- prior: the same over the mix of workloads that it was measured on; nothing about other ones. That is why requests at
  this level are watched the closest, and why a caller may ask for more (`ReusePolicy.basis`).

A `Watch` goes with each level: one per reader for `own`, one per tenant for the others. Knows no engine and no pages.
Guarded by its owner's lock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Calibration, Pair, pairs_needed
from kvcomm.align.importance import HeadFit
from kvcomm.align.ladder import TURNED, Ladder
from kvcomm.align.readers import Reader
from kvcomm.align.watch import Watch

MAX_READERS = 1000
"""Of a tenant; the one used longest ago is forgotten."""
MAX_OWN_PAIRS = 200
MAX_POOL_PAIRS = 600
"""The newest ones; older ones were measured with fewer anchors."""
MAX_AUDITS = 200
YOUNG_AUDITS = 8
"""A reader's first approximate requests that are all audited."""


class Level(StrEnum):
    """Where pairs come from."""

    OWN = "own"
    POOL = "pool"
    PRIOR = "prior"


LEVELS = (Level.OWN, Level.POOL, Level.PRIOR)
"""From the most specific to the least."""


class Audit(NamedTuple):
    """One approximate request held against exact computation.

    Attributes:
        at_s: when, on the monotonic clock.
        divergence: nats, measured.
        predicted: nats; what calibration expected at most.
        bound: that the caller asked for.
        level: that decided.
    """

    at_s: float
    divergence: float
    predicted: float
    bound: Bound
    level: Level

    @property
    def is_violation(self) -> bool:
        """Whether it broke the bound; a divergence that is no number does."""
        return not self.divergence <= self.bound.max_divergence


@dataclass(eq=False)
class Standing:
    """What is known of one reader.

    Attributes:
        pairs: its own, the oldest first.
        watches: over its own level, by bound.
        barred: levels that audits of this reader's requests have shown not to hold for it, by bound.
        audits: the latest.
        num_requests, num_approximated, num_audited: since it was first seen.
    """

    reader: Reader
    pairs: deque[Pair] = field(default_factory=lambda: deque(maxlen=MAX_OWN_PAIRS))
    watches: dict[Bound, Watch] = field(default_factory=dict)
    barred: dict[tuple[Bound, Level], Watch] = field(default_factory=dict)
    audits: deque[Audit] = field(default_factory=lambda: deque(maxlen=MAX_AUDITS))
    num_requests: int = 0
    num_approximated: int = 0
    num_audited: int = 0

    @property
    def is_young(self) -> bool:
        """Whether its approximate requests are still audited one by one."""
        return self.num_approximated <= YOUNG_AUDITS


class Grounds(NamedTuple):
    """On what a request may be served with moved text.

    Attributes:
        level: whose pairs decide.
        calibration: these pairs, along the ladder that is to be used.
        watch: over the level; says by which delta the rung is chosen.
    """

    level: Level
    calibration: Calibration
    watch: Watch


class Count(NamedTuple):
    """Pairs of one level along one ladder, and how many it takes until the level decides."""

    level: Level
    ladder: Ladder
    num_pairs: int
    num_needed: int


class KeptWatch(NamedTuple):
    """A watch with its place: `reader` is a digest, empty for watches of no single reader.

    Attributes:
        is_barring: it keeps a level from a reader; else it is over the level itself.
    """

    level: Level
    reader: str
    is_barring: bool
    watch: Watch


class Knowledge(NamedTuple):
    """All that is known of a tenant's readers, to be kept in a file."""

    readers: tuple[tuple[Reader, tuple[Pair, ...]], ...] = ()
    watches: tuple[KeptWatch, ...] = ()
    head_weights: tuple[float, ...] | None = None

    @property
    def num_pairs(self) -> int:
        """Of all readers."""
        return sum(len(pairs) for _, pairs in self.readers)

    def without_anchors(self) -> Knowledge:
        """The same without what was measured by rungs that need anchors."""
        readers = tuple((reader, tuple(_turned(pair) for pair in pairs)) for reader, pairs in self.readers)
        return self._replace(readers=readers)


@dataclass(eq=False)
class _Tenant:
    """One namespace. `pool` holds the newest pairs of all readers."""

    standings: OrderedDict[str, Standing] = field(default_factory=OrderedDict)
    pool: deque[Pair] = field(default_factory=lambda: deque(maxlen=MAX_POOL_PAIRS))
    watches: dict[tuple[Level, Bound], Watch] = field(default_factory=dict)
    heads: HeadFit = field(default_factory=HeadFit)
    has_prior: bool = False
    version: int = 0
    known: dict[tuple[str, Level, Ladder], tuple[int, Calibration]] = field(default_factory=dict)


class ReaderBook:
    """Every reader, tenant by tenant, and the prior of the model."""

    def __init__(self, prior: Sequence[Pair] = (), head_weights: tuple[float, ...] | None = None) -> None:
        """Args:
        prior: pairs that ship with the model; none: there is no such level.
        head_weights: that ship with it, see `HeadFit`.
        """
        self.prior = tuple(prior)
        self.head_weights = head_weights
        self._tenants: dict[str, _Tenant] = {}

    def standing(self, namespace: str, reader: Reader) -> Standing:
        """What is known of a reader; it is remembered from now on."""
        standings = self._tenant(namespace).standings
        found = standings.pop(reader.digest, None) or Standing(reader)
        standings[reader.digest] = found
        while len(standings) > MAX_READERS:
            standings.popitem(last=False)
        return found

    def find(self, namespace: str, digest: str) -> Standing | None:
        """What is known of the reader with this digest, if anything."""
        tenant = self._tenants.get(namespace)
        return None if tenant is None else tenant.standings.get(digest)

    def standings(self, namespace: str) -> Iterator[Standing]:
        """Every reader of a tenant, the one used last at the end."""
        tenant = self._tenants.get(namespace)
        yield from () if tenant is None else list(tenant.standings.values())

    def pool(self, namespace: str) -> tuple[Pair, ...]:
        """The pairs of all readers of a tenant, the oldest first."""
        tenant = self._tenants.get(namespace)
        return () if tenant is None else tuple(tenant.pool)

    def heads(self, namespace: str) -> HeadFit:
        """What exact answers of a tenant tell about heads; all readers share it, as heads are the model's."""
        return self._tenant(namespace).heads

    def add(self, namespace: str, reader: Reader, pair: Pair) -> None:
        """A prompt of a reader has been measured: it counts for its own level and for the pool."""
        tenant = self._tenant(namespace)
        self.standing(namespace, reader).pairs.append(pair)
        tenant.pool.append(pair)
        tenant.version += 1

    def counts(
        self, namespace: str, reader: Reader, ladders: Iterable[Ladder], bound: Bound, levels: Iterable[Level]
    ) -> list[Count]:
        """What each level has for a reader, in the order in which they are asked: level by level, ladder by ladder."""
        ladders = tuple(ladders)
        found = []
        for level in levels:
            for ladder in ladders:
                num_needed = pairs_needed(bound.delta / 2 if level is not Level.PRIOR else bound.delta)
                found.append(
                    Count(level, ladder, self._calibration(namespace, reader, level, ladder).num_pairs, num_needed)
                )
        return found

    def grounds(
        self, namespace: str, reader: Reader, ladders: Iterable[Ladder], bound: Bound, levels: Iterable[Level] = LEVELS
    ) -> Grounds | None:
        """What decides about a request: the most specific level with enough pairs.

        Enough are those that allow a violation among them. Where no level has so many, it is the one with most, if that
        is enough for a bound that none of them breaks.

        Args:
            ladders: that could be used for the request, the one that costs least first.
            levels: that the caller accepts, the most specific first.

        Returns:
            None where no level that holds has enough.
        """
        least, best = pairs_needed(bound.delta), None
        for each in self.counts(namespace, reader, ladders, bound, levels):
            if each.num_pairs < least or self.is_barred(namespace, reader, each.level, bound):
                continue
            if best is None or each.num_pairs > best.num_pairs:
                best = each
            if each.num_pairs >= each.num_needed:
                best = each
                break
        if best is None:
            return None
        calibration = self._calibration(namespace, reader, best.level, best.ladder)
        return Grounds(best.level, calibration, self.watch(namespace, reader, best.level, bound))

    def watch(self, namespace: str, reader: Reader, level: Level, bound: Bound) -> Watch:
        """The watch over a level as far as a reader's requests are concerned."""
        if level is Level.OWN:
            return self.standing(namespace, reader).watches.setdefault(bound, Watch(bound))
        return self._tenant(namespace).watches.setdefault((level, bound), Watch(bound))

    def watches(self, namespace: str) -> Iterator[tuple[Level, Reader | None, Watch]]:
        """Every watch of a tenant; those of its pool and prior belong to no single reader."""
        tenant = self._tenants.get(namespace)
        if tenant is None:
            return
        for (level, _), watch in tenant.watches.items():
            yield level, None, watch
        for standing in tenant.standings.values():
            for watch in standing.watches.values():
                yield Level.OWN, standing.reader, watch

    def audited(self, namespace: str, reader: Reader, audit: Audit) -> bool:
        """Count an audit; returns whether a breaker trips with it, of the level or of the reader under that level.

        A level that trips decides for nobody any more; a reader under whom one trips is not served by it. Where it is
        the reader's own, its pairs are of another time: it begins anew.
        """
        standing = self.standing(namespace, reader)
        standing.audits.append(audit)
        standing.num_audited += 1
        trips = self.watch(namespace, reader, audit.level, audit.bound).audited(audit.divergence)
        if audit.level is Level.OWN:
            if trips:
                self.restart(namespace, reader)
            return trips
        under = standing.barred.setdefault((audit.bound, audit.level), Watch(audit.bound))
        return under.audited(audit.divergence) or trips

    def restart(self, namespace: str, reader: Reader) -> None:
        """Forget a reader's own pairs and what was watched about them."""
        standing = self.standing(namespace, reader)
        standing.pairs.clear()
        standing.watches.clear()
        self._tenant(namespace).version += 1

    def knowledge(self, namespace: str) -> Knowledge:
        """A copy of all that is known of a tenant's readers; follows nothing."""
        tenant = self._tenant(namespace)
        watches = [KeptWatch(level, "", False, deepcopy(watch)) for (level, _), watch in tenant.watches.items()]
        for digest, standing in tenant.standings.items():
            watches += [KeptWatch(Level.OWN, digest, False, deepcopy(watch)) for watch in standing.watches.values()]
            watches += [KeptWatch(level, digest, True, deepcopy(each)) for (_, level), each in standing.barred.items()]
        readers = tuple((standing.reader, tuple(standing.pairs)) for standing in tenant.standings.values())
        return Knowledge(readers, tuple(watches), tenant.heads.weights)

    def put(self, namespace: str, knowledge: Knowledge) -> None:
        """Take over what was kept, in place of what is known of the same readers; their pairs join the pool."""
        tenant = self._tenant(namespace)
        for reader, pairs in knowledge.readers:
            tenant.standings[reader.digest] = Standing(reader)
            for pair in pairs:
                self.add(namespace, reader, pair)
        for kept in knowledge.watches:
            standing = tenant.standings.get(kept.reader)
            if not kept.reader:
                tenant.watches[kept.level, kept.watch.bound] = deepcopy(kept.watch)
            elif standing is not None and kept.is_barring:
                standing.barred[kept.watch.bound, kept.level] = deepcopy(kept.watch)
            elif standing is not None:
                standing.watches[kept.watch.bound] = deepcopy(kept.watch)
        if knowledge.head_weights is not None:
            tenant.heads = HeadFit(knowledge.head_weights)

    def admit_prior(self, namespace: str) -> None:
        """Let the prior decide about a tenant: it was measured on the weights that its requests are computed with."""
        tenant = self._tenant(namespace)
        if not tenant.has_prior:
            tenant.has_prior = True
            tenant.known.clear()
            if self.head_weights is not None and not tenant.heads.num_prompts:
                tenant.heads = HeadFit(self.head_weights)

    def forget(self, namespace: str) -> None:
        """Forget every reader of a tenant."""
        self._tenants.pop(namespace, None)

    def is_barred(self, namespace: str, reader: Reader, level: Level, bound: Bound) -> bool:
        """Whether a breaker has tripped that keeps a level from deciding about a reader."""
        if self.watch(namespace, reader, level, bound).breaker.tripped:
            return True
        under = self.standing(namespace, reader).barred.get((bound, level))
        return under is not None and under.breaker.tripped

    def _calibration(self, namespace: str, reader: Reader, level: Level, ladder: Ladder) -> Calibration:
        tenant = self._tenant(namespace)
        key = (reader.digest if level is Level.OWN else "", level, ladder)
        version, made = tenant.known.get(key, (-1, None))
        if made is None or (version != tenant.version and level is not Level.PRIOR):
            own = self.find(namespace, reader.digest)  # looking makes nobody known
            pairs: Mapping[Level, Sequence[Pair]] = {
                Level.OWN: () if own is None else tuple(own.pairs),
                Level.POOL: tuple(tenant.pool),
                Level.PRIOR: self.prior if tenant.has_prior else (),
            }
            made = Calibration(ladder, pairs[level])
            if len(tenant.known) > MAX_READERS:
                tenant.known.clear()
            tenant.known[key] = tenant.version, made
        return made

    def _tenant(self, namespace: str) -> _Tenant:
        return self._tenants.setdefault(namespace, _Tenant())


def _turned(pair: Pair) -> Pair:
    """A pair without what rungs gave that need anchors."""
    measured = {rung: each for rung, each in pair.measured.items() if rung.estimator == TURNED[0].estimator}
    return Pair(measured, {}, pair.sources)
