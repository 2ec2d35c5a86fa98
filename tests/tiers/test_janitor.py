"""What goes and what stays."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.tiers.janitor import KEEP_SHARE, chosen, sweep
from kvcomm.tiers.keys import ROOT
from kvcomm.tiers.store import StoredObject
from tests.limits import at_once
from tests.tiers.stores import DictStore


def filled(ages: Iterable[float], size: int = 10) -> DictStore:
    store = DictStore()
    for index, age in enumerate(ages):
        store.put_once(f"{ROOT}/space/prefix/{index}", [bytes(size)])
        store.times[f"{ROOT}/space/prefix/{index}"] = 1000.0 - age
    return store


def left(store: DictStore) -> list[int]:
    return sorted(int(key.rpartition("/")[2]) for key in store.objects)


def test_the_longest_unused_go_until_there_is_room() -> None:
    store = filled([5, 50, 1, 40, 3])
    swept = sweep(store, max_bytes=40, clock=lambda: 1000.0)
    assert left(store) == [0, 2, 4]
    assert (swept.num_objects, swept.num_bytes, swept.removed_objects, swept.removed_bytes) == (3, 30, 2, 20)


def test_nothing_goes_within_the_budget() -> None:
    store = filled([5, 50])
    assert sweep(store, max_bytes=20).removed_objects == 0


def test_age_and_what_is_bad() -> None:
    store = filled([5, 50, 1])
    swept = sweep(store, max_age_s=10, bad=[f"{ROOT}/space/prefix/2"], clock=lambda: 1000.0)
    assert (left(store), swept.removed_objects) == ([0], 2)


def test_a_dry_run_only_tells() -> None:
    store = filled([5, 50])
    assert sweep(store, max_age_s=10, is_dry=True, clock=lambda: 1000.0).removed_objects == 1
    assert left(store) == [0, 1]


def test_what_is_not_ours_stays() -> None:
    store = filled([5])
    store.objects |= {"holiday.jpg": b"x" * 1000, f"{ROOT}-other/a/b/c": b"x"}
    sweep(store, max_bytes=0)
    assert set(store.objects) == {"holiday.jpg", f"{ROOT}-other/a/b/c"}


def test_several_janitors_at_once() -> None:
    store = filled(range(50))
    at_once(4, lambda _: sweep(store, max_bytes=250, clock=lambda: 1000.0))
    assert left(store) == list(range(22))  # nine tenths of 250 bytes


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 100)), max_size=30),
    st.integers(0, 1000) | st.none(),
    st.integers(0, 60) | st.none(),
)
@settings(max_examples=80, deadline=None)
def test_what_goes_was_used_before_all_that_stays(
    items: list[tuple[int, int]], max_bytes: int | None, oldest_s: int | None
) -> None:
    found = [StoredObject(f"k{i}", size, used, used) for i, (size, used) in enumerate(items)]
    going = chosen(found, max_bytes=max_bytes, oldest_s=oldest_s, bad=())
    staying = [each for each in found if each not in going]
    assert len(set(going)) == len(going)
    if max_bytes is not None:
        assert sum(each.num_bytes for each in staying) <= max_bytes
    if oldest_s is not None:
        assert all(each.used_s >= oldest_s for each in staying)
    if going and staying:
        assert max(each.used_s for each in going) <= min(each.used_s for each in staying)
    if max_bytes is not None and oldest_s is None and going and sum(each.num_bytes for each in found) > max_bytes:
        latest = max(each.num_bytes for each in going)
        assert sum(each.num_bytes for each in staying) + latest > KEEP_SHARE * max_bytes - latest


def test_a_prefix_loses_its_end_first() -> None:
    found = [StoredObject(f"run{index}", 10, modified_s=float(index), used_s=100.0) for index in range(4)]
    going = chosen(found, max_bytes=25, oldest_s=None, bad=())
    assert [each.key for each in going] == ["run3", "run2"]
