"""Which replica a request goes to, by what replicas tell and what a router remembers."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvcomm.integrations.ray.choosing import ReplicaChooser
from kvcomm.integrations.ray.holding import HELD, LOAD, RESTORED, Holding
from kvcomm.integrations.ray.keys import wanted_of
from kvcomm.integrations.ray.messages import ForwardedRequest
from kvcomm.integrations.ray.pinning import PinnedIds, pin_of


def asked(text: str = "", *, context_id: str | None = None, before: str = "You are. ") -> ForwardedRequest:
    body: dict[str, Any] = {"messages": [{"role": "system", "content": before}, {"role": "user", "content": text}]}
    wanted = wanted_of(body, tenant="ann")
    return ForwardedRequest("POST", "/v1/chat/completions", b"/", b"", [], wanted=wanted, context_id=context_id)


def stats(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {HELD: [], RESTORED: [], LOAD: 0} for name in names}


def test_the_holder_comes_first_whoever_the_hash_would_take() -> None:
    request = asked("x" * 9000)
    for holder in ("a", "b", "c"):
        told = stats("a", "b", "c")
        told[holder][HELD] = list(request.wanted.all_keys())
        assert ReplicaChooser().order(request, told, {})[0] == holder


def test_the_holder_of_more_comes_before_the_holder_of_less() -> None:
    first, second = asked("x" * 9000), asked("y" * 9000)
    told = stats("a", "b", "c")
    told["a"][HELD] = list(first.wanted.all_keys())[:1]
    told["b"][HELD] = list(first.wanted.all_keys())[:3]
    assert ReplicaChooser().order(first, told, {})[0] == "b"
    assert ReplicaChooser().order(second, told, {})[0] in ("a", "b")


def test_a_router_remembers_where_it_sent_what_until_that_one_is_gone() -> None:
    chooser, told, request = ReplicaChooser(), stats("a", "b", "c"), asked("x" * 9000)
    hashed = ReplicaChooser().order(request, told, {})[0]
    other = next(name for name in told if name != hashed)
    chooser.sent(request, other)
    assert chooser.order(request, told, {})[0] == other
    chooser.forget(other)
    assert chooser.order(request, told, {})[0] == hashed


def test_an_overloaded_holder_is_passed_over() -> None:
    request, told = asked("x" * 9000), stats("a", "b")
    told["a"][HELD] = list(request.wanted.all_keys())
    told["a"][LOAD] = 1_000_000
    assert ReplicaChooser().order(request, told, {})[0] == "b"
    told["a"][LOAD] = 0
    assert ReplicaChooser().order(request, told, {"a": 1000})[0] == "b"


def test_a_context_is_its_replicas_alone() -> None:
    told, made = stats("a", "b", "c"), PinnedIds("b")(None)
    told["b"][LOAD] = 1_000_000
    assert ReplicaChooser().order(asked(context_id=made), told, {"b": 1000}) == ["b"]


def test_whoever_has_taken_a_family_over_keeps_it() -> None:
    made = PinnedIds("gone")(None)
    pin = pin_of(made)
    assert pin is not None
    for heir in ("a", "b", "c"):
        told = stats("a", "b", "c")
        told[heir][RESTORED] = [pin.family]
        assert ReplicaChooser().order(asked(context_id=made), told, {}) == [heir]
        chooser = ReplicaChooser()
        chooser.sent(asked(context_id=made), heir)
        assert chooser.order(asked(context_id=made), stats("a", "b", "c"), {}) == [heir]


def test_where_nobody_is_nobody_comes() -> None:
    assert ReplicaChooser().order(asked("x"), {}, {}) == []
    assert ReplicaChooser().order(asked(context_id=PinnedIds("a")(None)), {}, {}) == []


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=40))
def test_what_a_replica_tells_is_bounded_and_its_load_comes_back_to_nothing(calls: list[tuple[str, bool]]) -> None:
    holding = Holding(max_keys=3, max_families=2)
    served = []
    for text, is_served in calls:
        wanted = asked(text).wanted
        holding.begin(wanted)
        assert holding.stats()[LOAD] == wanted.num_tokens
        holding.end(wanted, is_served=is_served)
        holding.take_over(text)
        served += wanted.all_keys() if is_served else ()
    told = holding.stats()
    assert told[LOAD] == 0
    assert len(told[RESTORED]) <= 2
    latest = list(dict.fromkeys(reversed(served)))[:3]
    assert set(told[HELD]) == set(latest)
