"""A tier gives what was put, or a miss with its reason; never something else, and never an error."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.engine import engine as engine_module
from kvcomm.errors import InvalidRequest, TierError
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.segments import Segment
from kvcomm.tiers import record as record_module
from kvcomm.tiers.keys import ROOT, SpaceKeys, tenant_key
from kvcomm.tiers.space import DEFAULT_TENANT
from kvcomm.tiers.tier import KV, RenditionName, StoredRendition, Tier, TierMiss, TierSpace
from kvcomm.tiers.write_queue import Dropped
from tests.limits import PATIENCE_S
from tests.tiers.kv import NAMESPACE, RUN, SECRET, is_same, make_kv, make_space
from tests.tiers.stores import DictStore

IDS = tuple(range(20, 34))  # three whole runs of four, and two tokens
SEGMENT = Segment((3, 1, 4, 1, 5), "digits")
NAME = RenditionName(SEGMENT.digest(NAMESPACE), "signature", 7)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "kvcomm.tiers")


@pytest.fixture
def store() -> DictStore:
    return DictStore()


@pytest.fixture
def tier(store: DictStore) -> Iterator[Tier]:
    tier = fresh(store)
    yield tier
    tier.close(PATIENCE_S)


def fresh(store: DictStore, **options: Any) -> Tier:
    """Another process's tier over the same store."""
    return Tier(store, run_tokens=RUN, **options)


def only(store: DictStore) -> str:
    (key,) = store.objects
    return key


def get_prefix(tier: Tier, space: TierSpace, ids: Sequence[int], start: int, end: int, **options: Any) -> KV | TierMiss:
    """KV of whole runs, whose every one must be there."""
    read = tier.read_prefix(space, ids, start, end, **options)
    return read.joined() if read.miss is None else read.miss


def got(answer: KV | TierMiss) -> KV:
    assert not isinstance(answer, TierMiss), answer
    return answer


# Prefixes.


def test_a_prefix_there_and_back(store: DictStore, tier: Tier) -> None:
    kv = make_kv(IDS)
    assert tier.put_prefix(make_space(), IDS, kv) == 3
    assert tier.put_prefix(make_space(), IDS, kv) == 0
    other = fresh(store)
    assert other.prefix_length(make_space(), IDS) == 12
    assert is_same(got(get_prefix(other, make_space(), IDS, 0, 12)), kv.part(0, 12))
    assert is_same(got(get_prefix(other, make_space(), IDS, 4, 8)), kv.part(4, 8))
    assert other.put_prefix(make_space(), IDS, kv) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(tier: Tier, dtype: torch.dtype) -> None:
    space, kv = make_space(dtype=dtype), make_kv(IDS[:4], dtype=dtype)
    assert tier.put_prefix(space, IDS[:4], kv) == 1
    assert is_same(got(get_prefix(tier, space, IDS, 0, 4)), kv)


def test_prefixes_share_their_beginning(store: DictStore, tier: Tier) -> None:
    tier.put_prefix(make_space(), IDS, make_kv(IDS))
    branch = (*IDS[:8], 90, 91, 92, 93)
    assert tier.prefix_length(make_space(), branch) == 8
    assert tier.put_prefix(make_space(), branch, make_kv(branch)) == 1
    assert len(store.objects) == 4
    same_run_elsewhere = (*IDS[4:8], *IDS[4:8])
    assert tier.prefix_length(make_space(), same_run_elsewhere) == 0


def test_kv_from_a_start(tier: Tier) -> None:
    kv = make_kv(IDS)
    assert tier.put_prefix(make_space(), IDS, kv.part(6, len(IDS)), 6) == 1  # the run that begins at 8
    assert tier.prefix_length(make_space(), IDS) == 0
    assert tier.put_prefix(make_space(), IDS, kv) == 2
    assert is_same(got(get_prefix(tier, make_space(), IDS, 0, 12)), kv.part(0, 12))


@pytest.mark.parametrize("num_runs", range(9))
def test_lengths_are_found_by_bisection(store: DictStore, tier: Tier, num_runs: int) -> None:
    ids = tuple(range(32))
    tier.put_prefix(make_space(), ids[: num_runs * RUN], make_kv(ids[: num_runs * RUN]))
    store.calls.clear()
    assert fresh(store).prefix_length(make_space(), ids) == num_runs * RUN
    assert len(store.calls) <= 5


def test_a_lost_run_ends_what_is_read(store: DictStore, tier: Tier) -> None:
    kv = make_kv(IDS)
    tier.put_prefix(make_space(), IDS, kv)
    del store.objects[list(store.objects)[1]]
    read = fresh(store).read_prefix(make_space(), IDS, 0, 12)
    assert (read.num_tokens, read.miss) == (4, TierMiss.ABSENT)
    assert is_same(read.joined(), kv.part(0, 4))
    assert get_prefix(fresh(store), make_space(), IDS, 0, 12) is TierMiss.ABSENT


@pytest.mark.parametrize(("start", "end"), [(0, 0), (4, 4), (8, 4), (0, 6), (2, 8), (-4, 4), (0, 16)])
def test_runs_that_are_none(tier: Tier, start: int, end: int) -> None:
    with pytest.raises(InvalidRequest, match="whole runs of 4"):
        get_prefix(tier, make_space(), IDS, start, end)


def test_kv_that_does_not_fit(tier: Tier) -> None:
    kv = make_kv(IDS)
    for wrong in (kv.part(0, 5), KV(kv.keys[:1], kv.values[:1]), KV(kv.values, kv.keys), KV([], [])):
        with pytest.raises(InvalidRequest, match="as its space says"):
            tier.put_prefix(make_space(), IDS, wrong)
    with pytest.raises(InvalidRequest, match="as its space says"):
        tier.put_prefix(make_space(), IDS, make_kv(IDS, dtype=torch.float16))
    with pytest.raises(InvalidRequest, match="beyond the 97"):
        tier.put_prefix(make_space(), (97,) * 4, make_kv((97,) * 4))


@pytest.mark.parametrize("token", [-1, 97, 2**31, 2**70])
def test_tokens_that_the_model_does_not_know_are_nowhere(tier: Tier, token: int) -> None:
    ids = (token, *IDS[1:])
    assert tier.prefix_length(make_space(), ids) == 0
    assert get_prefix(tier, make_space(), ids, 0, 4) is TierMiss.ABSENT
    assert later(tier, ids, make_kv, lambda: None) is Dropped.NOTHING  # type: ignore[arg-type]


def test_numbers_that_are_not_finite_are_neither_written_nor_read(
    store: DictStore, tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = make_kv(IDS[:4])
    kv.values[1][2, 0, 1] = float("nan")
    assert tier.put_prefix(make_space(), IDS[:4], kv) == 0
    assert (store.objects, tier.stats().unwritten) == ({}, 1)
    with monkeypatch.context() as patched:
        patched.setattr(KV, "is_finite", lambda self: True)
        assert tier.put_prefix(make_space(), IDS[:4], kv) == 1
    assert get_prefix(fresh(store), make_space(), IDS, 0, 4) is TierMiss.CORRUPT


def test_sums_that_overflow_are_no_infinity() -> None:
    kv = KV([torch.full((4, 2, 4), 3e38)], [torch.zeros(4, 2, 4)])
    assert kv.is_finite()
    kv.keys[0][0, 0, 0] = float("inf")
    assert not kv.is_finite()


# Who sees what.


@pytest.mark.parametrize(
    "changes",
    [
        {"namespace": "f" * 64},
        {"producer": "vllm-cpu/0.32.0"},
        {"tenant": "other"},
        {"vocab_size": 98},
        {"dtype": torch.float16},
        {"shapes": make_space().shapes[::-1]},
    ],
)
def test_spaces_share_nothing(store: DictStore, changes: dict[str, Any]) -> None:
    tier = fresh(store, secret=SECRET)
    tier.put_prefix(make_space(), IDS, make_kv(IDS))
    tier.put_blob(make_space(), "bank", "b", b"x")
    other = make_space(**changes)
    assert tier.prefix_length(other, IDS) == 0
    assert get_prefix(tier, other, IDS, 0, 4) is TierMiss.ABSENT
    assert tier.get_blob(other, "bank", "b") is TierMiss.ABSENT
    assert tier.list_blobs(other, "bank") == []


def test_names_need_the_secret(store: DictStore) -> None:
    """Neither without it nor with another one are names, of objects or folders, the same."""
    for secret in (None, SECRET, SECRET[::-1]):
        fresh(store, secret=secret).put_prefix(make_space(), IDS[:4], make_kv(IDS[:4]))
    assert len(store.objects) == len({key.split("/")[1] for key in store.objects}) == 3
    assert all(b"default" not in content for content in store.objects.values())


def test_without_a_secret_only_the_default_tenant_is_served(store: DictStore, tier: Tier) -> None:
    other = make_space(tenant="other")
    assert tier.serves("default")
    assert not tier.serves("other")
    assert tier.put_prefix(other, IDS, make_kv(IDS)) == 0
    assert get_prefix(tier, other, IDS, 0, 4) is TierMiss.REFUSED
    assert tier.get_rendition(other, NAME) is TierMiss.REFUSED
    assert tier.get_blob(other, "bank", "b") is TierMiss.REFUSED
    assert not tier.put_rendition(other, NAME, SEGMENT.token_ids, make_kv(SEGMENT.token_ids), Fidelity.EXACT)
    assert not tier.put_blob(other, "bank", "b", b"x")
    assert (tier.prefix_length(other, IDS), tier.list_blobs(other, "bank"), store.calls) == (0, [], [])
    assert tier.stats().misses["refused"] >= 5


def test_a_record_sealed_by_another_is_foreign(store: DictStore) -> None:
    """Who can write the store but lacks the secret puts nothing in a tenant's way that is used."""
    space, kv = make_space(), make_kv(IDS[:4])
    tier = fresh(store, secret=SECRET)
    tier.put_prefix(space, IDS[:4], kv)
    key = only(store)
    forger = SpaceKeys(b"another key", space)
    (link,) = SpaceKeys(tenant_key(SECRET, "default") or b"", space).chain(IDS[:4], RUN)
    header = record_module.header_of(space, "prefix", token_ids=IDS[:4], parent=link.parent)
    forged = record_module.pack_kv(header, make_kv(IDS[:4], seed=1), lambda digest: forger.seal(key, digest))
    store.objects[key] = b"".join(forged)
    assert get_prefix(tier, space, IDS, 0, 4) is TierMiss.FOREIGN
    assert store.objects == {}


@pytest.mark.parametrize("secret", [b"", b"short"])
def test_a_secret_that_can_be_guessed(store: DictStore, secret: bytes) -> None:
    with pytest.raises(TierError, match="16 bytes or more"):
        fresh(store, secret=secret)


def test_the_default_tenant_is_the_engines() -> None:
    assert DEFAULT_TENANT == engine_module.DEFAULT_TENANT


# Damage.


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_whatever_is_done_to_objects_it_is_a_miss_or_right(data: st.DataObject) -> None:
    store = DictStore()
    space = make_space()
    tier = fresh(store)
    prefixes = {
        ids: make_kv(ids, seed=seed) for seed, ids in enumerate([IDS[:8], (1, *IDS[1:8]), (*IDS[:4], 5, 6, 7, 8)])
    }
    expected: dict[tuple[int, ...], KV] = {}
    for ids, kv in prefixes.items():
        tier.put_prefix(space, ids, kv)
        expected[ids] = got(get_prefix(tier, space, ids, 0, 8))
    tier.put_rendition(space, NAME, SEGMENT.token_ids, make_kv(SEGMENT.token_ids), Fidelity.EXACT)
    tier.put_blob(space, "bank", "b", b"content")
    for _ in range(data.draw(st.integers(1, 3))):
        damage(store, data)
    other = fresh(store)
    for ids, kv in expected.items():
        read = other.read_prefix(space, ids, 0, 8)
        assert (read.miss is None) == (read.num_tokens == 8)
        assert not read.runs or is_same(read.joined(), kv.part(0, read.num_tokens))
    rendition = other.get_rendition(space, NAME, allows_approximate=True)
    if isinstance(rendition, StoredRendition):
        assert rendition.token_ids == SEGMENT.token_ids
        assert is_same(rendition.kv, make_kv(SEGMENT.token_ids))
    assert other.get_blob(space, "bank", "b") in (b"content", *TierMiss)
    for ids, kv in prefixes.items():  # what was damaged goes when it is met, and can be written again
        answers = [(other.put_prefix(space, ids, kv), get_prefix(other, space, ids, 0, 8))[1] for _ in range(4)]
        assert got(answers[-1]).num_tokens == 8


def damage(store: DictStore, data: st.DataObject) -> None:
    """Cut, flip, lengthen, empty, swap, copy or lose objects."""
    keys = sorted(store.objects)
    if not keys:
        return
    key, other = data.draw(st.sampled_from(keys)), data.draw(st.sampled_from(keys))
    content = bytearray(store.objects[key])
    kind = data.draw(st.sampled_from(["cut", "flip", "longer", "zeros", "swap", "copy", "lose"]))
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content)))]
    elif kind == "flip" and content:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "longer":
        content += bytes(data.draw(st.integers(1, 100)))
    elif kind == "zeros":
        content = bytearray(len(content))
    elif kind == "swap":
        content, store.objects[other] = bytearray(store.objects[other]), bytes(content)
    elif kind == "copy":
        content = bytearray(store.objects[other])
    store.objects[key] = bytes(content)
    if kind == "lose":
        del store.objects[key]


def test_every_byte_counts(store: DictStore, tier: Tier) -> None:
    """A flipped bit anywhere but in white space and the seal's name is a miss; nowhere is it wrong KV."""
    kv = make_kv(IDS[:4])
    tier.put_prefix(make_space(), IDS[:4], kv)
    key = only(store)
    whole = store.objects[key]
    for place in range(0, len(whole), 7):
        store.objects[key] = whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]
        answer = get_prefix(tier, make_space(), IDS, 0, 4)
        assert answer in (TierMiss.CORRUPT, TierMiss.FOREIGN, TierMiss.TOO_NEW) or is_same(got(answer), kv)


def test_an_object_under_another_name_is_foreign_and_goes(store: DictStore, tier: Tier) -> None:
    tier.put_prefix(make_space(), IDS[:8], make_kv(IDS[:8]))
    first, second = store.objects
    store.objects[second] = store.objects[first]
    read = tier.read_prefix(make_space(), IDS, 0, 8)
    assert (read.num_tokens, read.miss) == (4, TierMiss.FOREIGN)
    assert set(store.objects) == {first}
    assert tier.put_prefix(make_space(), IDS[:8], make_kv(IDS[:8])) == 1
    assert is_same(got(get_prefix(tier, make_space(), IDS, 0, 8)), make_kv(IDS[:8]))


def test_what_a_newer_version_wrote_stays(store: DictStore, tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(record_module, "FORMAT", record_module.FORMAT._replace(version=2))
        tier.put_prefix(make_space(), IDS[:4], make_kv(IDS[:4]))
    assert get_prefix(tier, make_space(), IDS, 0, 4) is TierMiss.TOO_NEW
    assert len(store.objects) == 1


# Renditions and blobs.


def test_renditions(store: DictStore, tier: Tier) -> None:
    kv, before = make_kv(SEGMENT.token_ids), (Segment((1, 2), "question"), Segment((), None))
    assert tier.put_rendition(
        make_space(), NAME, SEGMENT.token_ids, kv, Fidelity.EXACT, slot="text", before=before, risk=0.0
    )
    assert not tier.put_rendition(make_space(), NAME, SEGMENT.token_ids, kv, Fidelity.EXACT)
    found = fresh(store).get_rendition(make_space(), NAME)
    assert isinstance(found, StoredRendition)
    assert is_same(found.kv, kv)
    assert found._replace(kv=kv) == StoredRendition(NAME, SEGMENT.token_ids, kv, Fidelity.EXACT, "text", before, 0.0)
    for other in (NAME._replace(position=8), NAME._replace(signature="x"), NAME._replace(digest="0" * 64)):
        assert tier.get_rendition(make_space(), other) is TierMiss.ABSENT


def test_approximate_renditions_are_only_given_to_who_allows_them(store: DictStore, tier: Tier) -> None:
    space, ids = make_space(), SEGMENT.token_ids
    tier.put_rendition(space, NAME, ids, make_kv(ids, seed=1), Fidelity.APPROXIMATE, risk=0.25)
    assert tier.get_rendition(space, NAME) is TierMiss.ABSENT
    assert tier.list_renditions(space, NAME.digest) == []
    assert tier.list_renditions(space, NAME.digest, allows_approximate=True) == [NAME]
    found = tier.get_rendition(space, NAME, allows_approximate=True)
    assert isinstance(found, StoredRendition)
    assert (found.fidelity, found.risk) == (Fidelity.APPROXIMATE, 0.25)
    tier.put_rendition(space, NAME, ids, make_kv(ids), Fidelity.EXACT)
    found = fresh(store).get_rendition(space, NAME, allows_approximate=True)
    assert isinstance(found, StoredRendition)
    assert found.fidelity is Fidelity.EXACT
    # Not even under the exact one's name.
    approximate, exact = sorted(store.objects, key=lambda key: b"approximate" not in store.objects[key])
    store.objects[exact] = store.objects[approximate]
    assert fresh(store).get_rendition(space, NAME) is TierMiss.FOREIGN


def test_a_renditions_name_is_of_its_tokens(tier: Tier) -> None:
    with pytest.raises(InvalidRequest, match="not the digest"):
        tier.put_rendition(make_space(), NAME, (1, 2), make_kv((1, 2)), Fidelity.EXACT)


def test_renditions_of_a_segment_are_listed(store: DictStore, tier: Tier) -> None:
    ids = SEGMENT.token_ids
    names = {NAME._replace(position=position) for position in range(3)}
    for name in names:
        tier.put_rendition(make_space(), name, ids, make_kv(ids), Fidelity.EXACT)
    assert set(tier.list_renditions(make_space(), NAME.digest)) == names
    store.objects[next(iter(store.objects))] = b"damaged"
    assert len(tier.list_renditions(make_space(), NAME.digest)) == 2


@pytest.mark.parametrize("name", ["plain", "a/b\0ü \n../..", "", "x" * 10_000, "\ud800"])
def test_blobs_by_any_name(store: DictStore, tier: Tier, name: str) -> None:
    space = make_space()
    if name == "\ud800":
        with pytest.raises(InvalidRequest, match="surrogate"):
            tier.put_blob(space, "bank", name, b"x")
        return
    assert tier.put_blob(space, "bank", name, b"")
    assert tier.put_blob(space, "bank", name, b"second")
    assert tier.put_blob(space, "prior", name, b"of another kind")
    other = fresh(store)
    assert other.get_blob(space, "bank", name) == b"second"
    assert other.list_blobs(space, "bank") == [name]
    assert len(store.objects) == 2
    assert other.delete_blob(space, "bank", name)
    assert not other.delete_blob(space, "bank", name)
    assert other.get_blob(space, "bank", name) is TierMiss.ABSENT
    assert other.get_blob(space, "prior", name) == b"of another kind"


def test_a_damaged_version_leaves_the_one_before(store: DictStore, tier: Tier) -> None:
    tier.put_blob(make_space(), "reader", "r", b"first")
    kept = dict(store.objects)
    tier.put_blob(make_space(), "reader", "r", b"second")
    store.objects = kept | {only(store): b"torn"}
    assert fresh(store).get_blob(make_space(), "reader", "r") == b"first"


# Trouble.


@pytest.mark.parametrize("operation", ["get", "get_range", "put_once", "list", "delete"])
def test_a_store_that_fails_is_a_miss(store: DictStore, tier: Tier, operation: str) -> None:
    space, ids = make_space(), SEGMENT.token_ids
    tier.put_prefix(space, IDS, make_kv(IDS))
    tier.put_blob(space, "bank", "b", b"x")
    store.fail(operation)
    other = fresh(store)
    assert other.prefix_length(space, IDS) in (0, 12)
    assert other.read_prefix(space, IDS, 0, 12).miss in (None, TierMiss.FAILED)
    assert other.get_rendition(space, NAME) in (TierMiss.FAILED, TierMiss.ABSENT)
    assert other.get_blob(space, "bank", "b") in (b"x", TierMiss.FAILED)
    other.list_blobs(space, "bank")
    other.list_renditions(space, NAME.digest)
    other.put_prefix(space, (1, 2, 3, 4), make_kv((1, 2, 3, 4)))
    other.put_rendition(space, NAME, ids, make_kv(ids), Fidelity.EXACT)
    other.put_blob(space, "bank", "b", b"y")
    other.delete_blob(space, "bank", "b")
    other.sweep()
    assert "the wire is cut" in other.stats().trouble
    other.close()
    assert get_prefix(other, space, IDS, 0, 4) is TierMiss.REFUSED


def test_a_failing_tier_is_not_worth_asking(store: DictStore, tier: Tier) -> None:
    tier.put_prefix(make_space(), IDS, make_kv(IDS))
    get_prefix(tier, make_space(), IDS, 0, 12)
    assert tier.is_worth(1000, 10.0)
    store.fail("get")
    get_prefix(tier, make_space(), IDS, 0, 12)
    assert not tier.is_worth(1000, 10.0)
    assert tier.stats().is_failing


def test_writing_is_left_alone_while_it_fails(store: DictStore, tier: Tier) -> None:
    store.fail("put_once")
    for seed in range(20):
        tier.put_prefix(make_space(), (seed, 1, 2, 3), make_kv((seed, 1, 2, 3)))
    assert len([operation for operation, _ in store.calls if operation == "put_once"]) == 1


def test_a_read_that_is_late_is_not_waited_for(store: DictStore, tier: Tier) -> None:
    kv = make_kv(IDS)
    tier.put_prefix(make_space(), IDS, kv)
    may_go_on = stop_at(store, "get", list(store.objects)[1])
    read = tier.read_prefix(make_space(), IDS, 0, 12, deadline_s=0.2)
    assert (read.num_tokens, read.miss) == (4, TierMiss.SLOW)
    assert is_same(read.joined(), kv.part(0, 4))
    expected_s = tier.reads.expected_s(make_space().token_bytes * RUN)
    assert expected_s is not None
    assert expected_s >= 0.2
    may_go_on.set()
    assert tier.read_prefix(make_space(), IDS, 0, 12, deadline_s=PATIENCE_S).miss is None


def test_while_many_reads_are_late_nobody_waits(store: DictStore, tier: Tier) -> None:
    tier.put_prefix(make_space(), IDS, make_kv(IDS))
    may_go_on = stop_at(store, "get", next(iter(store.objects)))
    for _ in range(8):
        assert get_prefix(tier, make_space(), IDS, 0, 4, deadline_s=0.0) is TierMiss.SLOW
    num_gets = len(store.calls)
    assert get_prefix(tier, make_space(), IDS, 0, 4, deadline_s=PATIENCE_S) is TierMiss.SLOW
    assert len(store.calls) == num_gets
    may_go_on.set()


def stop_at(store: DictStore, operation: str, key: str) -> threading.Event:
    may_go_on = threading.Event()

    def before(asked: str, name: str) -> None:
        if (asked, name) == (operation, key):
            may_go_on.wait(PATIENCE_S)

    store.before = before
    return may_go_on


def test_objects_lost_while_they_are_read(store: DictStore, tier: Tier) -> None:
    tier.put_prefix(make_space(), IDS, make_kv(IDS))
    store.before = lambda operation, key: store.objects.pop(key, None) if operation == "get" else None
    assert tier.prefix_length(make_space(), IDS) == 12
    assert get_prefix(tier, make_space(), IDS, 0, 12) is TierMiss.ABSENT
    store.fail()
    assert tier.put_prefix(make_space(), IDS, make_kv(IDS)) == 1  # it noticed which one is gone


# Writing behind, the janitor.


def later(tier: Tier, ids: tuple[int, ...], load: Callable[[int], KV], ended: Callable[[], object]) -> Dropped | None:
    return tier.put_prefix_later(make_space(), ids, load, num_bytes=1, ended=ended)


def test_writing_behind(store: DictStore, tier: Tier) -> None:
    kv, starts, ended = make_kv(IDS), [], threading.Semaphore(0)
    tier.put_prefix(make_space(), IDS[:4], kv.part(0, 4))

    def load(start: int) -> KV:
        starts.append(start)
        return kv.part(start, 12)

    assert later(tier, IDS, load, ended.release) is None
    assert tier.queue.flush(PATIENCE_S)
    assert later(tier, IDS, load, ended.release) is None  # all of it is known to be there
    assert later(tier, IDS[:3], load, ended.release) is Dropped.NOTHING
    assert [ended.acquire(timeout=PATIENCE_S) for _ in range(3)] == [True] * 3
    assert starts == [4]
    assert is_same(got(get_prefix(fresh(store), make_space(), IDS, 0, 12)), kv.part(0, 12))


def test_closing_writes_what_waits(store: DictStore) -> None:
    tier, ended = fresh(store), threading.Semaphore(0)
    for seed in range(5):
        ids = (seed, *IDS[1:4])
        later(tier, ids, lambda start, ids=ids: make_kv(ids), ended.release)  # type: ignore[misc]
    tier.close(PATIENCE_S)
    assert len(store.objects) == 5
    assert [ended.acquire(timeout=0) for _ in range(5)] == [True] * 5
    assert later(tier, IDS, lambda start: make_kv(IDS[:12]), ended.release) is not None or ended.acquire(timeout=0)


def test_the_byte_budget_is_kept(store: DictStore) -> None:
    size = 3000
    tier = fresh(store, max_bytes=5 * size)
    for seed in range(30):
        ids = (seed, *IDS[1:4])
        assert tier.put_prefix(make_space(), ids, make_kv(ids)) == 1
        tier.queue.flush(PATIENCE_S)
    assert sum(map(len, store.objects.values())) <= 6 * size
    assert tier.prefix_length(make_space(), (29, *IDS[1:4])) == 4
    tier.close(PATIENCE_S)


@pytest.mark.parametrize(
    ("option", "value"), [("run_tokens", 0), ("run_tokens", 1.5), ("max_bytes", 0), ("max_bytes", "1G")]
)
def test_settings_that_cannot_be(tmp_path: Any, option: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=option):
        Tier.open(str(tmp_path), **{option: value})  # type: ignore[arg-type]


def test_a_folder_of_something_else_is_let_be(tmp_path: Any) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    (tmp_path / ROOT).write_bytes(b"a file where a folder should be")
    tier = Tier.open(f"file://{tmp_path}", run_tokens=RUN)
    assert tier.prefix_length(make_space(), IDS) == 0
    assert tier.put_prefix(make_space(), IDS, make_kv(IDS)) == 0
    assert tier.sweep() is not None
    assert (tmp_path / "model.safetensors").exists()
    tier.close()


def space_of(tenant: str) -> TierSpace:
    return make_space(tenant=tenant)


def test_tenants_with_a_secret(store: DictStore) -> None:
    tier = fresh(store, secret=SECRET)
    for seed, tenant in enumerate(["a", "b"]):
        tier.put_prefix(space_of(tenant), IDS[:4], make_kv(IDS[:4], seed=seed))
    assert is_same(got(get_prefix(tier, space_of("a"), IDS, 0, 4)), make_kv(IDS[:4]))
    assert is_same(got(get_prefix(tier, space_of("b"), IDS, 0, 4)), make_kv(IDS[:4], seed=1))
    first, second = store.objects
    store.objects[first], store.objects[second] = store.objects[second], store.objects[first]
    assert get_prefix(tier, space_of("a"), IDS, 0, 4) is TierMiss.FOREIGN  # equal tokens, another tenant's seal
