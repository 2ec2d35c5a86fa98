"""Segments that were read behind another prefix, moved: what a client asks for, and what it is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from kvcomm.align.standings import Level
from kvcomm.engine.engine import Engine
from kvcomm.engine.results import ApproximationReport, Usage
from kvcomm.reuse.healing import NotHealed
from kvcomm.reuse.plan import BoundInForce
from kvcomm.server.sampling import default_policy
from kvcomm.server.settings import ServerSettings
from kvcomm.server.usage import usage_of
from tests.engine.conftest import ROWS_ONLY
from tests.limits import PATIENCE_S
from tests.server.conftest import MakeClient, chat

CHAT = "/v1/chat/completions"
LOOSE = {"mode": "approximate", "max_divergence": 50.0, "confidence": 0.5}
"""A bound that a random model keeps: what is tested here is the way to it, not how well it does."""
ROLES = ("You check every step of what others have written. ", "You write a short summary for a child of ten years. ")
NUM_ROUNDS = 6
TASK = [{"role": "system", "content": "how many coins is that in all?"}]
"""Static text: a turn's own text would be one more slot."""


def document(number: int) -> str:
    """Text that no other number has."""
    return " ".join(f"item {number * 37 + index * 11} costs {index * number + 3} coins;" for index in range(12))


def segments(role: int, number: int) -> list[dict[str, Any]]:
    """What stands before the messages."""
    return [
        {"id": "role", "content": ROLES[role]},
        {"id": "document", "content": document(number), "kind": "dynamic"},
    ]


def ask(client: TestClient, role: int, number: int, **fields: Any) -> dict[str, Any]:
    """Let a role read a document; the usage."""
    told = {"messages": TASK, "include_plan": True} | fields
    response = client.post(CHAT, json=chat(segments=segments(role, number), **told))
    assert response.status_code == 200, response.text
    usage: dict[str, Any] = response.json()["usage"]
    return usage


@pytest.fixture
def client(make_client: MakeClient, engine: Engine) -> TestClient:
    """Of a server that has learned how the second role reads what the first one has read."""
    engine.reuse.parts.cost.model = ROWS_ONLY
    client = make_client()
    for number in range(NUM_ROUNDS):
        for role in range(len(ROLES)):
            ask(client, role, number, reuse=LOOSE)
        assert engine.wait_idle(PATIENCE_S)
    return client


def test_a_dynamic_segment_is_moved_behind_another_role(client: TestClient) -> None:
    ask(client, 0, 99, reuse=LOOSE)
    usage = ask(client, 1, 99, reuse=LOOSE)
    (aligned,) = [span for span in usage["plan"] if span["source"] == "aligned"]
    num_document_tokens = aligned["end"] - aligned["start"]
    assert usage["aligned_tokens"] == num_document_tokens > 50
    bound = usage["bound"]
    assert (bound["max_divergence"], bound["confidence"], bound["level"]) == (50.0, 0.5, "own")
    assert bound["num_pairs"] >= 3  # two of three would be none
    assert (usage["rung"], usage["rung_name"]) == (0.0, usage["rung_name"])
    assert usage["rung_name"] in ("rotate", "token")
    assert usage["cached_prefix_tokens"] == aligned["start"]
    assert usage["prompt_tokens"] == aligned["end"] + usage["computed_tokens"]


def test_the_least_that_a_caller_accepts(make_client: MakeClient, engine: Engine) -> None:
    """Pairs of other kinds of prompts count for a new one, unless its caller wants its own."""
    engine.reuse.parts.cost.model = ROWS_ONLY
    client = make_client()
    learn_from_others(client, engine)
    ask(client, 0, 99, reuse=LOOSE)
    own = ask(client, 1, 99, reuse=LOOSE | {"basis": "own"})
    assert (own["aligned_tokens"], own["bound"]["level"], own["bound"]["num_pairs"]) == (0, None, 0)
    engine.cache.clear()
    ask(client, 0, 98, reuse=LOOSE)
    pool = ask(client, 1, 98, reuse=LOOSE | {"basis": "pool"})
    assert (pool["aligned_tokens"] > 50, pool["bound"]["level"]) == (True, "pool")


def test_the_server_says_what_is_accepted_where_a_request_does_not(make_client: MakeClient, engine: Engine) -> None:
    engine.reuse.parts.cost.model = ROWS_ONLY
    client = make_client(max_divergence=50.0, confidence=0.5, basis="own")
    learn_from_others(client, engine)
    ask(client, 0, 99)
    usage = ask(client, 1, 99)
    assert (usage["aligned_tokens"], usage["bound"]["level"]) == (0, None)


def learn_from_others(client: TestClient, engine: Engine) -> None:
    """Pairs of prompts that end otherwise than those of the tests."""
    ending = [{"role": "system", "content": "name the dearest item"}]
    for number in range(NUM_ROUNDS):
        for role in range(len(ROLES)):
            ask(client, role, number, reuse=LOOSE, messages=ending)
        assert engine.wait_idle(PATIENCE_S)


def test_moved_text_is_healed_on_request(client: TestClient) -> None:
    ask(client, 0, 99, reuse=LOOSE)
    heal = LOOSE | {"heal": True, "heal_within": 2}
    healed = ask(client, 1, 99, reuse=heal, max_tokens=5)
    assert healed["aligned_tokens"] > 50
    assert (healed["healed_after"], healed["not_healed"]) == (min(2, healed["completion_tokens"]), None)
    exact = ask(client, 1, 99, reuse={"mode": "exact"})
    assert exact["cached_prefix_tokens"] > healed["aligned_tokens"]  # what was healed is an exact prefix
    assert (exact["healed_after"], exact["not_healed"]) == (None, None)


def test_the_server_heals_where_a_request_does_not_say() -> None:
    policy = default_policy(ServerSettings(max_divergence=50.0, heal=True, heal_within=3))
    assert (policy.heal, policy.heal_within) == (True, 3)


@pytest.mark.parametrize("within", [0, -1, 1.5, "soon", None])
def test_a_number_of_tokens_that_is_none(client: TestClient, within: object) -> None:
    response = client.post(CHAT, json=chat(reuse=LOOSE | {"heal": True, "heal_within": within}))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "reuse.heal_within")


@pytest.mark.parametrize("basis", ["", "all", None, 3])
def test_a_basis_that_there_is_not(client: TestClient, basis: object) -> None:
    response = client.post(CHAT, json=chat(reuse=LOOSE | {"basis": basis}))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "reuse.basis")


def test_the_bound_of_several_prompts_rests_on_least() -> None:
    """What holds for all of them is what the least specific one rests on."""

    def usage(bound: BoundInForce | None, share: float | None) -> Usage:
        name = "token" if share == 0 else "rotate 30 % attention"
        moved = None if share is None else ApproximationReport("r", name, share, 0.01, 0.0, None)
        return Usage(10, 0, 0, 10, 1, 0.0, 0.1, 0.2, {}, bound, moved)

    own, pool = BoundInForce(0.02, 0.05, Level.OWN, 10), BoundInForce(0.02, 0.05, Level.POOL, 500)
    less, nothing = BoundInForce(0.02, 0.05, Level.POOL, 40), BoundInForce(0.02, 0.05)
    told = usage_of([usage(nothing, None), usage(own, 0.0), usage(pool, 0.3), usage(less, 0.0)])
    assert told.bound is not None
    assert (told.bound.level, told.bound.num_pairs) == ("pool", 40)
    assert (told.rung, told.rung_name) == (0.3, "rotate 30 % attention")
    alone = usage_of([usage(nothing, None)])
    assert alone.bound is not None
    assert (alone.bound.level, alone.bound.num_pairs, alone.rung, alone.rung_name) == (None, 0, None, None)
    assert usage_of([usage(None, None)]).bound is None


def test_several_prompts_are_healed_with_the_last_of_them() -> None:
    usage = Usage(10, 0, 0, 10, 1, 0.0, 0.1, 0.2)
    healed = [replace(usage, healed_after=3), usage, replace(usage, healed_after=8)]
    assert (usage_of(healed).healed_after, usage_of(healed).not_healed) == (8, None)
    told = usage_of([usage, *(replace(usage, not_healed=reason) for reason in NotHealed)])
    assert (told.healed_after, told.not_healed) == (None, "no_room")
    for reason in NotHealed:
        assert usage_of([replace(usage, not_healed=reason)]).not_healed == reason.value


@pytest.mark.parametrize("reuse", [None, {"mode": "exact"}])
def test_nobody_gets_moved_text_who_has_not_asked(client: TestClient, reuse: dict[str, Any] | None) -> None:
    ask(client, 0, 99, reuse=LOOSE)
    ask(client, 1, 99, reuse=LOOSE)
    usage = ask(client, 1, 99, **({} if reuse is None else {"reuse": reuse}))
    assert usage["aligned_tokens"] == 0
    assert {span["source"] for span in usage["plan"]} == {"exact", "computed"}


def test_explain_tells_what_will_be_moved(client: TestClient) -> None:
    ask(client, 0, 99, reuse=LOOSE)
    response = client.post("/v1/cache/explain", json=chat(segments=segments(1, 99), messages=TASK, reuse=LOOSE))
    (explained,) = response.json()["prompts"]
    usage = ask(client, 1, 99, reuse=LOOSE)
    assert explained["plan"] == usage["plan"]
    assert explained["aligned_tokens"] == usage["aligned_tokens"] > 0
