"""The routing policy against small cases worked out by hand, and laws that hold for any of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.integrations.ray.routing import (
    MovableText,
    Policy,
    PromptPrefix,
    Wanted,
    candidates,
    rank,
    rendezvous,
)

WORKERS = [f"w{number}" for number in range(8)]
PROMPT = Wanted(1_000, (PromptPrefix("a", 256), PromptPrefix("ab", 512), PromptPrefix("abc", 768)))
EXACT_LOADS = Policy(thrift=1, slack=0)


def idle(*workers: str) -> dict[str, float]:
    return dict.fromkeys(workers or WORKERS, 0.0)


def test_the_deepest_holder_comes_first() -> None:
    order = rank(PROMPT, {"a": {"w1", "w2"}, "ab": {"w2"}}, idle())
    assert order[:2] == ["w2", "w1"]
    assert sorted(order) == WORKERS


def test_a_holder_is_passed_over_when_it_is_busier_by_more_than_it_saves() -> None:
    holders = {"a": {"w1"}, "ab": {"w1"}}
    assert rank(PROMPT, holders, {"w1": 511.0, "w2": 0.0}, policy=EXACT_LOADS)[0] == "w1"
    assert rank(PROMPT, holders, {"w1": 513.0, "w2": 0.0}, policy=EXACT_LOADS)[0] == "w2"
    assert rank(PROMPT, holders, {"w1": 511.0 + 256, "w2": 0.0}, policy=Policy(thrift=1, slack=256))[0] == "w1"


def test_what_the_tier_holds_makes_a_holder_less_dear() -> None:
    """Everybody can have 768 tokens at a quarter of their cost: holding 512 of them saves 384, and no more."""
    wanted = Wanted(1_000, PROMPT.runs, tier_tokens=768)
    policy = Policy(thrift=1, slack=0, tier_cost=0.25)
    holders = {"a": {"w1"}, "ab": {"w1"}}
    assert rank(wanted, holders, {"w1": 383.0 * 0.25, "w2": 0.0}, policy=policy)[0] == "w1"
    assert rank(wanted, holders, {"w1": 513.0 * 0.25, "w2": 0.0}, policy=policy)[0] == "w2"


def test_segments_count_where_they_lie_beyond_the_prefix() -> None:
    wanted = Wanted(1_000, (PromptPrefix("a", 300),), (MovableText("s", 200, 400), MovableText("t", 400, 900)))
    policy = Policy(thrift=1, slack=0, segment_worth=0.5)
    holders = {"a": {"w1"}, "s": {"w1", "w2"}, "t": {"w2"}}  # w1 saves 300 + 50, w2 100 + 250
    assert rank(wanted, holders, {"w1": 0.0, "w2": 1.0}, policy=policy)[0] == "w1"
    assert rank(wanted, holders, {"w1": 1.0, "w2": 0.0}, policy=policy)[0] == "w2"


def test_unknown_workers_and_keys_are_ignored() -> None:
    assert rank(PROMPT, {"a": {"gone"}, "zz": {"w1"}}, idle("w1", "w2")) == rank(PROMPT, {}, idle("w1", "w2"))
    assert rank(PROMPT, {"a": {"gone"}}, {}) == []


def test_a_new_prompt_goes_to_one_home_and_few_move_when_a_worker_goes() -> None:
    prompts = [Wanted(300, (PromptPrefix(f"key{number}", 256),)) for number in range(200)]
    homes = {prompt.first_key: rank(prompt, {}, idle())[0] for prompt in prompts}
    assert set(homes.values()) == set(WORKERS)
    left = [worker for worker in WORKERS if worker != "w3"]
    for prompt in prompts:
        home = rank(prompt, {}, idle(*left))[0]
        assert home == homes[prompt.first_key] or homes[prompt.first_key] == "w3"


keys = st.sampled_from(["a", "ab", "abc"])
loads_ = st.dictionaries(st.sampled_from(WORKERS), st.integers(0, 4_000).map(float), min_size=1)


@given(st.dictionaries(keys, st.sets(st.sampled_from(WORKERS))), loads_, st.integers(0, 500))
def test_the_first_is_a_cheapest_one(holders: dict[str, set[str]], loads: dict[str, float], slack: int) -> None:
    def cost(worker: str) -> float:
        ends = [run.end for run in PROMPT.runs if worker in holders.get(run.key, ())]
        return 1_000 - max(ends, default=0) + max(loads[worker] - min(loads.values()) - slack, 0)

    order = rank(PROMPT, holders, loads, policy=Policy(thrift=1, slack=slack))
    assert [cost(worker) for worker in order] == sorted(cost(worker) for worker in loads)
    assert set(order) == set(loads)


@given(st.dictionaries(keys, st.sets(st.sampled_from(WORKERS))), loads_)
def test_candidates_are_enough_to_choose(holders: dict[str, set[str]], loads: dict[str, float]) -> None:
    """So that a router of many workers need not look at all of them. Who holds a run holds those before it."""
    nested = {
        "a": holders.get("a", set()) | holders.get("ab", set()) | holders.get("abc", set()),
        "ab": holders.get("ab", set()) | holders.get("abc", set()),
        "abc": holders.get("abc", set()),
    }
    near = {worker for worker, load in loads.items() if load - min(loads.values()) <= Policy().slack}
    few = candidates(PROMPT, nested, loads, near)
    assert near <= set(few) <= set(loads)
    assert rank(PROMPT, nested, few)[0] == rank(PROMPT, nested, loads)[0]


@given(st.dictionaries(keys, st.sets(st.sampled_from(WORKERS))), loads_)
def test_holders_and_the_least_loaded_are_enough_to_choose(
    holders: dict[str, set[str]], loads: dict[str, float]
) -> None:
    least = min(loads.values())
    holding = set().union(*(holders.get(key, set()) for key in PROMPT.all_keys()))
    few = {worker: load for worker, load in loads.items() if load - least <= Policy().slack or worker in holding}
    assert rank(PROMPT, holders, few)[0] == rank(PROMPT, holders, loads)[0]


def test_rendezvous_is_the_same_everywhere() -> None:
    assert rendezvous("key", "worker") == 14486615309245517930


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"slack": -1}, "slack"),
        ({"thrift": 0.9}, "thrift"),
        ({"segment_worth": 1.1}, "segment_worth"),
        ({"tier_cost": -0.1}, "tier_cost"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must"):
        Policy(**settings)
