"""Segments that were read behind another prefix, moved: what a client asks for, and what it is told."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from kvcomm.align.calibration import Calibration
from kvcomm.engine.engine import Engine
from tests.engine.conftest import ROWS_ONLY
from tests.limits import PATIENCE_S
from tests.server.conftest import MakeClient, chat

CHAT = "/v1/chat/completions"
LOOSE = {"mode": "approximate", "max_divergence": 50.0, "confidence": 0.5}
"""A bound that a random model keeps: what is tested here is the way to it, not how well it does."""
ROLES = ("You check every step of what others have written. ", "You write a short summary for a child of ten years. ")
NUM_ROUNDS = 20
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
    response = client.post(CHAT, json=chat(segments=segments(role, number), messages=TASK, include_plan=True, **fields))
    assert response.status_code == 200, response.text
    usage: dict[str, Any] = response.json()["usage"]
    return usage


@pytest.fixture
def client(make_client: MakeClient, engine: Engine) -> TestClient:
    """Of a server that has learned and calibrated the edge from the first role to the second."""
    engine.reuse.cost.model = ROWS_ONLY
    client = make_client()
    for number in range(NUM_ROUNDS):
        for role in range(len(ROLES)):
            ask(client, role, number, reuse=LOOSE)
        assert engine.wait_idle(PATIENCE_S)
    # A few texts say little about how far the next one may be from them: let any distance pass.
    for group in engine.reuse.groups.groups(engine.namespace()):
        pairs = [pair._replace(distance=10.0) for pair in group.calibration.pairs]
        group.calibration = Calibration(len(group.key.shares), pairs)
    return client


def test_a_dynamic_segment_is_moved_behind_another_role(client: TestClient) -> None:
    ask(client, 0, 99, reuse=LOOSE)
    usage = ask(client, 1, 99, reuse=LOOSE)
    (aligned,) = [span for span in usage["plan"] if span["source"] == "aligned"]
    num_document_tokens = aligned["end"] - aligned["start"]
    assert usage["aligned_tokens"] == num_document_tokens > 50
    assert usage["bound"] == {"max_divergence": 50.0, "confidence": 0.5}
    assert usage["rung"] == 0.0
    assert usage["cached_prefix_tokens"] == aligned["start"]
    assert usage["prompt_tokens"] == aligned["end"] + usage["computed_tokens"]


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
