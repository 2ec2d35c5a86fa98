"""Fair shares: one tenant alone may have nearly everything, and no number of its requests shuts a second one out."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.server.admission import AdmissionControl
from kvcomm.server.errors import ApiError
from kvcomm.server.settings import Limits, ServerSettings
from kvcomm.server.tenants import Tenant


def admission(num_tenants: int = 2, **settings: int) -> AdmissionControl:
    """With so many tenants that may come."""
    return AdmissionControl(ServerSettings(**settings), lambda: num_tenants)  # type: ignore[arg-type]  # numbers only


def let_in(
    stack: ExitStack, doors: AdmissionControl, tenant: Tenant, most: int | None = None
) -> tuple[int, ApiError | None]:
    """Let in as many requests of a tenant as there is room for, or `most`; how many, and what the next was told."""
    for number in count():
        if number == most:
            return number, None
        try:
            stack.enter_context(doors.letting_in(tenant, computes=True))
        except ApiError as error:
            return number, error
    raise AssertionError


def test_a_second_tenant_finds_places() -> None:
    doors, tenants = admission(max_requests=256), [Tenant(name, Limits()) for name in "abcdef"]
    with ExitStack() as stack:
        counts = []
        for tenant in tenants:
            number, error = let_in(stack, doors, tenant)
            assert error is not None
            assert (error.status_code, error.code) == (429, "fair_share")
            assert "retry-after" in (error.headers or {})
            counts.append(number)
        assert counts == [224, 16, 8, 4, 2, 1]
        assert not doors.is_full
    assert doors.num_open == 0
    assert all(tenant.num_open == tenant.num_computing == 0 for tenant in tenants)


def test_one_tenant_alone_takes_all() -> None:
    doors = admission(1, max_requests=256)
    with ExitStack() as stack:
        number, error = let_in(stack, doors, Tenant("ann", Limits()))
        assert number == 256
        assert error is not None
        assert (error.status_code, error.code) == (503, "overloaded")


@pytest.mark.parametrize(("kept", "expected"), [(0, 16), (4, 12), (15, 8), (100, 8), (None, 14)])
def test_how_many_are_kept_is_a_setting(kept: int | None, expected: int) -> None:
    """Whatever is kept, a tenant gets half of all: it holds no more than it leaves."""
    doors = AdmissionControl(ServerSettings(max_requests=16, kept_requests=kept), lambda: 2)
    with ExitStack() as stack:
        assert let_in(stack, doors, Tenant("ann", Limits()))[0] == expected


@given(
    most=st.integers(2, 40),
    steps=st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 40)), max_size=80),
)
def test_whoever_holds_nothing_gets_a_place_while_few_are_here(most: int, steps: list[tuple[int, bool, int]]) -> None:
    """While one other tenant is here, in whatever order requests come and go, a second one is let in."""
    doors, tenants = admission(4, max_requests=most), [Tenant(str(index), Limits()) for index in range(4)]
    held: list[tuple[int, ExitStack]] = []
    for who, comes, which in steps:
        if comes:
            others = sum(1 for index, each in enumerate(tenants) if each.num_open and index != who)
            is_first, stack = tenants[who].num_open == 0, ExitStack()
            number, _ = let_in(stack, doors, tenants[who], 1)
            held += [(who, stack)] * number
            assert number == 1 or not is_first or others > 1
        elif held:
            held.pop(which % len(held))[1].close()
        assert sum(tenant.num_open for tenant in tenants) == doors.num_open == len(held) <= most
    for _, stack in held:
        stack.close()
    assert doors.num_open == 0


def test_a_tenants_own_limit_counts_at_the_door() -> None:
    doors, ann = admission(max_requests=8), Tenant("ann", Limits(max_requests=1))
    with ExitStack() as stack:
        number, error = let_in(stack, doors, ann)
        assert number == 1
        assert error is not None
        assert (error.status_code, error.code) == (429, "too_many_requests")
        stack.enter_context(doors.letting_in(ann, computes=False))  # a fork, a new name
        assert let_in(stack, doors, Tenant("bob", Limits()), 1)[0] == 1


def test_prompts_of_one_request_are_counted_before_any_is_made() -> None:
    doors, ann = admission(max_requests=256), Tenant("ann", Limits())
    doors.require_places(ann, 224)
    with pytest.raises(ApiError) as refused:
        doors.require_places(ann, 225)
    assert refused.value.code == "fair_share"
    with pytest.raises(ApiError) as refused:
        doors.require_places(ann, 257)
    assert (refused.value.status_code, refused.value.code) == (400, "too_many_prompts")
    bob = Tenant("bob", Limits(max_requests=3))
    doors.require_places(bob, 3)
    with pytest.raises(ApiError) as refused:
        doors.require_places(bob, 4)
    assert refused.value.param == "prompt"
    bob.num_requests = 1
    with pytest.raises(ApiError) as refused:
        doors.require_places(bob, 3)
    assert (refused.value.status_code, refused.value.code) == (429, "too_many_requests")
