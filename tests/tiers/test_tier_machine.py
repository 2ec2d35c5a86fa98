"""Whatever is put, lost, damaged, swept or failing, in whatever order: what tiers give is what was put."""

from __future__ import annotations

import logging

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.segments import Segment
from kvcomm.tiers.janitor import sweep
from kvcomm.tiers.tier import RenditionName, StoredRendition, Tier, TierMiss
from tests.tiers.kv import NAMESPACE, RUN, SECRET, is_same, make_kv, make_space
from tests.tiers.stores import DictStore

TOKENS = st.lists(st.integers(0, 1), max_size=13).map(tuple)
"""Of two kinds, so that prefixes meet."""
TENANTS = st.sampled_from(["default", "other"])
WORKERS = st.integers(0, 1)
SEEDS = {"default": 1, "other": 2}
"""KV of tenants differs, so that a mix-up shows."""


class TierMachine(RuleBasedStateMachine):
    """Two workers and a janitor over one store; a third one reads everything."""

    @initialize()
    def start(self) -> None:
        logging.getLogger("kvcomm.tiers").setLevel(logging.CRITICAL)
        self.store = DictStore()
        self.workers = [Tier(self.store, secret=SECRET, run_tokens=RUN) for _ in range(2)]

    @rule(worker=WORKERS, tenant=TENANTS, ids=TOKENS)
    def put(self, worker: int, tenant: str, ids: tuple[int, ...]) -> None:
        space, kv = make_space(tenant=tenant), make_kv(ids, seed=SEEDS[tenant])
        self.workers[worker].put_prefix(space, ids, kv)

    @rule(worker=WORKERS, tenant=TENANTS, ids=TOKENS, is_exact=st.booleans())
    def put_rendition(self, worker: int, tenant: str, ids: tuple[int, ...], is_exact: bool) -> None:
        fidelity = Fidelity.EXACT if is_exact else Fidelity.APPROXIMATE
        name = RenditionName(Segment(ids).digest(NAMESPACE), "signature", 0)
        kv = make_kv(ids, seed=SEEDS[tenant] + (0 if is_exact else 10))
        self.workers[worker].put_rendition(make_space(tenant=tenant), name, ids, kv, fidelity)

    @rule(worker=WORKERS, tenant=TENANTS, ids=TOKENS)
    def read(self, worker: int, tenant: str, ids: tuple[int, ...]) -> None:
        tier, space, whole = self.workers[worker], make_space(tenant=tenant), len(ids) // RUN * RUN
        assert tier.prefix_length(space, ids) in range(0, whole + 1, RUN)
        if whole:
            read = tier.read_prefix(space, ids, 0, whole)
            assert (read.miss is None) == (read.num_tokens == whole)
            wanted = make_kv(ids, seed=SEEDS[tenant]).part(0, read.num_tokens)
            assert not read.runs or is_same(read.joined(), wanted)

    @rule(worker=WORKERS, tenant=TENANTS, ids=TOKENS, allows=st.booleans())
    def read_rendition(self, worker: int, tenant: str, ids: tuple[int, ...], allows: bool) -> None:
        name = RenditionName(Segment(ids).digest(NAMESPACE), "signature", 0)
        found = self.workers[worker].get_rendition(make_space(tenant=tenant), name, allows_approximate=allows)
        if isinstance(found, StoredRendition):
            is_exact = found.fidelity is Fidelity.EXACT
            assert is_exact or allows
            assert is_same(found.kv, make_kv(ids, seed=SEEDS[tenant] + (0 if is_exact else 10)))
        else:
            assert found in TierMiss

    @rule(data=st.data(), kind=st.sampled_from(["lose", "cut", "flip", "swap"]))
    def damage(self, data: st.DataObject, kind: str) -> None:
        objects = self.store.objects
        if not objects:
            return
        key, other = (data.draw(st.sampled_from(sorted(objects))) for _ in range(2))
        content = bytearray(objects[key])
        if kind == "lose":
            del objects[key]
        elif kind == "cut":
            objects[key] = bytes(content[: len(content) // 2])
        elif kind == "flip" and content:
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1
            objects[key] = bytes(content)
        elif kind == "swap":
            objects[key], objects[other] = objects[other], objects[key]

    @rule(operations=st.sets(st.sampled_from(["get", "get_range", "put_once", "list", "delete"])))
    def fail(self, operations: set[str]) -> None:
        self.store.fail(*operations)

    @rule()
    def mend(self) -> None:
        self.store.fail()

    @rule(max_bytes=st.integers(0, 20_000))
    def prune(self, max_bytes: int) -> None:
        self.store.fail()
        assert sweep(self.store, max_bytes=max_bytes).num_bytes <= max_bytes

    @invariant()
    def nothing_waits(self) -> None:
        for worker in getattr(self, "workers", ()):
            assert worker.stats().queued == 0


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
