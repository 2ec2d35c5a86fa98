"""`/v1/stats` holds the caller's own numbers, equal to what its answers said, and nobody else's; plans of prompts."""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from kvcomm.align.groups import Audit, GroupKey
from kvcomm.engine.engine import Engine
from kvcomm.reuse.plan import Plan, Reason, Span, SpanKind
from kvcomm.server.keys import KeyRing, add_key
from kvcomm.server.schemas.stats import Stats
from kvcomm.server.settings import Limits
from tests.server.conftest import Keys, MakeClient, chat, completion

CHAT = "/v1/chat/completions"
STATS = "/v1/stats"


def stats_of(client: TestClient, **headers: Any) -> dict[str, Any]:
    """The caller's stats."""
    response = client.get(STATS, **headers)
    assert response.status_code == 200, response.text
    return Stats.model_validate(response.json()).model_dump()


def test_sums_are_those_of_the_answers(client: TestClient) -> None:
    usages = [client.post(CHAT, json=chat()).json()["usage"] for _ in range(3)]
    usages.append(client.post("/v1/completions", json=completion(prompt=["a dog", "a fox"])).json()["usage"])
    found = stats_of(client)
    assert found["requests"] == 5  # two of them by one completion
    assert found["requests_in_flight"] == 0
    assert found["generated_tokens"] == sum(usage["completion_tokens"] for usage in usages)
    assert found["tokens"] == {
        "exact": sum(usage["cached_prefix_tokens"] for usage in usages),
        "aligned": 0,
        "computed": sum(usage["computed_tokens"] for usage in usages),
    }
    reasons = sum((Counter(usage["miss_reasons"]) for usage in usages), Counter())
    assert found["miss_reasons"] == dict(reasons)
    assert [each["tokens"]["computed"] for each in found["recent"][2:]] == [
        usage["computed_tokens"] for usage in reversed(usages[:3])
    ]


def test_the_histogram(client: TestClient) -> None:
    times = [client.post(CHAT, json=chat()).json()["usage"]["timings"]["ttft_s"] for _ in range(4)]
    ttft = stats_of(client)["ttft"]
    edges = [0.0, *ttft["bounds_s"], float("inf")]
    expected = [sum(low < value <= high for value in times) for low, high in pairwise(edges)]
    assert ttft["counts"] == expected
    assert ttft["sum_s"] == pytest.approx(sum(times))


def test_what_is_cached_and_what_was_dropped(client: TestClient, engine: Engine) -> None:
    client.post("/v1/completions", json=completion(max_tokens=1))
    cache = stats_of(client)["cache"]
    assert cache["tokens"] == engine.tree.usage(engine.namespace()).num_tokens > 0
    assert cache["bytes"] == engine.memory_stats().num_cached * engine.pool.page_bytes
    engine.tree.evict(10_000)
    found = stats_of(client)
    assert found["cache"]["tokens"] == 0
    assert found["cache"]["evicted_tokens"] == cache["tokens"] == sum(each["tokens"] for each in found["evictions"])
    assert {each["reason"] for each in found["evictions"]} == {"evicted"}
    (first,) = (each for each in found["evictions"] if each["start"] == 0)
    assert "The quick brown fox".startswith(first["label"][:10])


def test_audits_and_bounds(client: TestClient, engine: Engine) -> None:
    client.post(CHAT, json=chat())
    assert (stats_of(client)["audits"], stats_of(client)["bounds"]) == ([], [])
    key = GroupKey((), "rotate", (0.0,))
    group = engine.reuse.groups.group(engine.namespace(), key, (0.0,))
    bound = (0.02, 0.05)
    for divergence, predicted in ((0.01, 0.015), (0.03, float("inf")), (float("nan"), 0.01)):
        audit = Audit(time.monotonic(), divergence, predicted, bound)
        group.audits.append(audit)
        group.breaker(bound).observe(audit.is_violation)
    found = stats_of(client)
    assert [(each["divergence"], each["predicted"], each["violated"]) for each in found["audits"]] == [
        (None, 0.01, True),
        (0.03, None, True),
        (0.01, 0.015, False),
    ]
    (watched,) = found["bounds"]
    assert (watched["num_audited"], watched["num_violations"], watched["tripped"]) == (3, 2, False)
    assert (watched["max_divergence"], watched["confidence"]) == (0.02, 0.95)
    assert {each["group"] for each in found["audits"]} == {watched["group"]} == {key.digest}


def test_tenants_see_their_own(make_client: MakeClient, keys: Keys, key_file: Path, engine: Engine) -> None:
    client = make_client(keys=KeyRing(key_file))
    before = stats_of(client, headers=keys.header("bob"))
    for fields in ({}, {"cache_salt": "s"}):
        client.post(CHAT, json=chat(max_tokens=1, **fields), headers=keys.header("ann"))
    engine.tree.evict(10_000)
    engine.reuse.groups.group(engine.namespace("ann"), GroupKey((), "rotate", (0.0,)), (0.0,)).breaker((0.02, 0.05))
    ann, bob = (stats_of(client, headers=keys.header(name)) for name in ("ann", "bob"))
    assert (ann["requests"], len(ann["bounds"])) == (2, 1)
    assert sum(each["tokens"] for each in ann["evictions"]) == ann["cache"]["evicted_tokens"] > 0
    assert bob | {"uptime_s": 0} == before | {"uptime_s": 0}


def test_looking_uses_up_no_rate(make_client: MakeClient, key_file: Path) -> None:
    key = add_key(key_file, "ann", limits=Limits(requests_per_minute=2))
    client = make_client(keys=KeyRing(key_file))
    client.app.state.kvcomm.tenants._clock = lambda: 0.0  # type: ignore[attr-defined]  # no rate recovers meanwhile
    headers = {"authorization": f"Bearer {key}"}
    for _ in range(5):
        stats_of(client, headers=headers)
    answers = [client.post(CHAT, json=chat(), headers=headers).status_code for _ in range(3)]
    assert answers == [200, 200, 429]


def test_the_plan_of_a_prompt(client: TestClient) -> None:
    for _ in range(2):
        usage = client.post(CHAT, json=chat(include_plan=True)).json()["usage"]
        plan, tokens = usage["plan"], Counter[str]()
        assert [span["start"] for span in plan] == [0, *(span["end"] for span in plan[:-1])]
        assert plan[-1]["end"] == usage["prompt_tokens"]
        for span in plan:
            tokens[span["source"]] += span["end"] - span["start"]
            assert (span["reason"] is None) == (span["source"] != "computed")
        assert tokens["exact"] == usage["cached_prefix_tokens"]
        assert tokens["computed"] == usage["computed_tokens"]
    assert [(span["source"], span["reason"]) for span in plan] == [("exact", None), ("computed", "last_token")]


def test_no_plan_unless_asked_for(client: TestClient) -> None:
    assert client.post(CHAT, json=chat()).json()["usage"]["plan"] is None
    refused = client.post("/v1/completions", json=completion(include_plan=True))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "include_plan")


def test_the_plan_of_a_stream(client: TestClient) -> None:
    body = chat(include_plan=True, stream=True, stream_options={"include_usage": True})
    assert '"plan":[{"start":0,' in client.post(CHAT, json=body).text


@pytest.mark.parametrize(("position", "aligned"), [(None, 0), (9, 0), (6, 0), (4, 2), (0, 6)])
def test_reused_text_behind_moved_text_is_not_exact(position: int | None, aligned: int) -> None:
    plan = Plan((Span(SpanKind.EXACT, 0, 6), Span(SpanKind.COMPUTE, 6, 9, Reason.NEW)))
    seen = plan.exact_up_to(position)
    kinds = [kind for span in seen.spans for kind in [span.kind] * (span.end - span.start)]
    assert kinds == [SpanKind.EXACT] * (6 - aligned) + [SpanKind.ALIGNED] * aligned + [SpanKind.COMPUTE] * 3
    assert seen.reasons == plan.reasons
