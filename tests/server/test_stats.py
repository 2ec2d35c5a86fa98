"""`/v1/stats` holds the caller's own numbers, equal to what its answers said, and nobody else's; plans of prompts."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from kvcomm.align.bound import Bound
from kvcomm.align.calibration import Measured, Pair
from kvcomm.align.ladder import TURNED
from kvcomm.align.readers import Reader
from kvcomm.align.standings import Audit, Level
from kvcomm.engine.cache import MemoryStats
from kvcomm.engine.engine import Engine
from kvcomm.reuse.plan import Plan, Reason, Span, SpanKind
from kvcomm.server.keys import KeyRing, add_key
from kvcomm.server.schemas.stats import Stats
from kvcomm.server.settings import Limits, ServerSettings
from tests.limits import PATIENCE_S, wait_for
from tests.server.conftest import MODEL, Keys, MakeClient, chat, completion
from tests.server.live import serving
from tests.stored import cached_by

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
        "tier": 0,
        "read_along": 0,
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


def test_the_last_minute_and_the_minutes_before(client: TestClient) -> None:
    """Sums of the time over which they are shown: an hour later they are gone, and the totals are not."""
    usages = [client.post(CHAT, json=chat()).json()["usage"] for _ in range(3)]
    expected = {
        "requests": 3,
        "refused": 0,
        "prompt_tokens": sum(usage["prompt_tokens"] for usage in usages),
        "reused_tokens": sum(usage["cached_prefix_tokens"] for usage in usages),
        "generated_tokens": sum(usage["completion_tokens"] for usage in usages),
    }
    history = client.app.state.kvcomm.tenants.get().tally.history  # type: ignore[attr-defined]
    now = history._clock
    for later_s, in_minute, in_curve in ((0, 1, 1), (120, 0, 1), (3600, 0, 0)):
        history._clock = lambda later_s=later_s: now() + later_s
        found = stats_of(client)
        assert found["last_minute"].pop("seconds") <= 60
        assert found["last_minute"] == {name: in_minute * number for name, number in expected.items()}
        assert found["curves"].pop("step_s") > 0
        assert {name: sum(steps) for name, steps in found["curves"].items()} == {
            name: in_curve * number for name, number in expected.items()
        }
        assert found["requests"] == 3


def test_what_is_cached_and_what_was_dropped(client: TestClient, engine: Engine) -> None:
    client.post("/v1/completions", json=completion(max_tokens=1))
    cache = stats_of(client)["cache"]
    assert cache["tokens"] == cached_by(engine, engine.namespace()).num_tokens > 0
    assert cache["bytes"] == engine.cache.stats().num_cached * engine.pool.page_bytes
    with engine.lock:
        engine.tree.evict(10_000)
    found = stats_of(client)
    assert found["cache"]["tokens"] == 0
    assert found["cache"]["evicted_tokens"] == cache["tokens"] == sum(each["tokens"] for each in found["evictions"])
    assert {each["reason"] for each in found["evictions"]} == {"evicted"}
    (first,) = (each for each in found["evictions"] if each["start"] == 0)
    assert "The quick brown fox".startswith(first["label"][:10])


READER, OTHER = Reader("5a" * 32, ("document", "question")), Reader("c4" * 32, ("question",))
BOUND = Bound(0.02, 0.1)


def learn(engine: Engine, reader: Reader, num_pairs: int, tenant: str = "default") -> None:
    """Add pairs along the turned rungs."""
    for _ in range(num_pairs):
        pair = Pair({rung: Measured(0.001) for rung in TURNED})
        engine.reuse.parts.book.add(engine.namespace(tenant), reader, pair)


def audit(engine: Engine, reader: Reader, level: Level, *found: tuple[float, float], tenant: str = "default") -> None:
    """Count audits: (divergence, predicted)."""
    for divergence, predicted in found:
        each = Audit(time.monotonic(), divergence, predicted, BOUND, level)
        engine.reuse.parts.book.audited(engine.namespace(tenant), reader, each)


def test_audits_and_bounds(client: TestClient, engine: Engine) -> None:
    client.post(CHAT, json=chat())
    found = stats_of(client)
    assert (found["audits"], found["bounds"], found["readers"]) == ([], [], [])
    learn(engine, READER, 7)
    learn(engine, OTHER, 5)
    audit(engine, READER, Level.OWN, (0.01, 0.015), (0.03, float("inf")), (float("nan"), 0.01))
    found = stats_of(client)
    assert [(each["divergence"], each["predicted"], each["violated"]) for each in found["audits"]] == [
        (None, 0.01, True),
        (0.03, None, True),
        (0.01, 0.015, False),
    ]
    assert {(each["reader"], each["level"]) for each in found["audits"]} == {(READER.digest, "own")}
    (watched,) = found["bounds"]
    assert (watched["num_audited"], watched["num_violations"], watched["tripped"]) == (3, 2, False)
    assert (watched["max_divergence"], watched["confidence"]) == (0.02, 0.9)
    assert (watched["reader"], watched["slots"], watched["level"]) == (READER.digest, list(READER.slots), "own")
    assert (watched["num_pairs"], watched["num_needed"]) == (7, 9)  # nine without a violation make one in ten
    assert watched["working_delta"] < BOUND.delta
    assert [(each["reader"], each["num_pairs"], each["num_audited"]) for each in found["readers"]] == [
        (READER.digest, 7, 3),
        (OTHER.digest, 5, 0),
    ]


def test_a_level_that_all_readers_share_stands_first(client: TestClient, engine: Engine) -> None:
    client.post(CHAT, json=chat())
    learn(engine, READER, 7)
    learn(engine, OTHER, 5)
    audit(engine, READER, Level.OWN, (0.01, 0.02))
    audit(engine, OTHER, Level.POOL, (0.01, 0.02))
    first = stats_of(client)["bounds"][0]
    assert (first["reader"], first["slots"], first["level"]) == (None, [], "pool")
    assert (first["num_audited"], first["num_pairs"], first["num_needed"]) == (1, 12, 9)


def test_a_bound_that_does_not_hold_is_told(client: TestClient, engine: Engine) -> None:
    client.post(CHAT, json=chat())
    audit(engine, READER, Level.PRIOR, *[(1.0, 0.01)] * 6)
    assert {each["tripped"] for each in stats_of(client)["bounds"]} == {True}


def test_tenants_see_their_own(make_client: MakeClient, keys: Keys, key_file: Path, engine: Engine) -> None:
    client = make_client(keys=KeyRing(key_file))
    before = stats_of(client, headers=keys.header("bob"))
    for fields in ({}, {"cache_salt": "s"}):
        client.post(CHAT, json=chat(max_tokens=1, **fields), headers=keys.header("ann"))
    with engine.lock:
        engine.tree.evict(10_000)
    audit(engine, READER, Level.OWN, (0.01, 0.02), tenant="ann")
    ann, bob = (stats_of(client, headers=keys.header(name)) for name in ("ann", "bob"))
    assert (ann["requests"], len(ann["bounds"]), len(ann["readers"]), len(ann["audits"])) == (2, 1, 1, 1)
    assert sum(each["tokens"] for each in ann["evictions"]) == ann["cache"]["evicted_tokens"] > 0
    assert sum(bob["curves"]["requests"]) == 0
    for each in (before, bob):
        assert each["last_minute"].pop("seconds") >= 0
    assert bob | {"uptime_s": 0} == before | {"uptime_s": 0}


@pytest.mark.parametrize("path", ["/v1/stats", "/v1/anchors/status", "/admin/status"])
def test_who_looks_holds_nobody_up(path: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """While somebody else has the engine's lock, whatever needs no engine is answered at once."""
    has_begun, memory_stats = threading.Event(), engine.cache.stats

    def noted() -> MemoryStats:
        has_begun.set()
        return memory_stats()

    monkeypatch.setattr(engine.cache, "stats", noted)
    with serving(engine, ServerSettings(model=MODEL, port=0)) as live, ThreadPoolExecutor(1) as pool:
        with engine.lock:
            looking = pool.submit(httpx2.get, f"{live.url}{path}", timeout=PATIENCE_S)
            wait_for(lambda: live.state.workers.short.num_inside or has_begun.is_set())
            assert httpx2.get(f"{live.url}/version", timeout=PATIENCE_S).status_code == 200
            assert not looking.done()
        assert looking.result(PATIENCE_S).status_code == 200


def test_what_is_missing_for_the_next_level(client: TestClient, engine: Engine) -> None:
    client.post(CHAT, json=chat())
    learn(engine, OTHER, 12)
    learn(engine, READER, 7)
    found = client.get("/v1/anchors/status", params={"max_divergence": 0.05, "confidence": 0.9}).json()
    assert (found["max_divergence"], found["confidence"]) == (0.05, pytest.approx(0.9))
    assert [each["reader"] for each in found["readers"]] == [READER.digest, OTHER.digest]  # the latest first
    (reader, other), newcomer = found["readers"], found["newcomer"]
    assert pairs_of(reader) == {"own": (7, 9, 19), "pool": (19, 9, 19), "prior": (0, 9, 9)}
    assert pairs_of(other) == {"own": (12, 9, 19), "pool": (19, 9, 19), "prior": (0, 9, 9)}
    assert pairs_of(newcomer) == {"own": (0, 9, 19), "pool": (19, 9, 19), "prior": (0, 9, 9)}
    # The pool has as many as it takes; its pairs say that the boldest turned rung holds.
    for each in (reader, other, newcomer):
        assert (each["level"], each["rung"], each["rung_name"], each["reason"]) == ("pool", 0.0, "rotate", None)
        assert (each["edges"], each["predicted_divergence"]) == ([], pytest.approx(0.001))
    own = client.get("/v1/anchors/status", params={"max_divergence": 0.05, "confidence": 0.9, "basis": "own"}).json()
    assert [each["level"] for each in own["readers"]] == [None, "own"]
    assert (own["newcomer"]["level"], own["newcomer"]["reason"]) == (None, "uncalibrated")


def pairs_of(reader: dict[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Along the turned rungs: pairs there are, from which on the level may decide, from which on it does."""
    levels = [each for each in reader["levels"] if each["estimator"] == "rotate"]
    return {each["level"]: (each["num_pairs"], each["num_needed"], each["num_settled"]) for each in levels}


def test_looking_at_what_is_missing_makes_nobody_known(client: TestClient, engine: Engine) -> None:
    for _ in range(2):
        found = client.get("/v1/anchors/status").json()
        assert (found["readers"], found["newcomer"]["reason"]) == ([], "uncalibrated")
    assert engine.reuse.readers() == []


def test_the_bound_that_is_counted_for(make_client: MakeClient) -> None:
    """Where nothing is said: what the server promises, and where that is exact, what "approximate" alone stands for."""
    for settings, bound in (({}, (0.02, 0.95)), ({"max_divergence": 0.1, "confidence": 0.8}, (0.1, 0.8))):
        found = make_client(**settings).get("/v1/anchors/status").json()
        assert (found["max_divergence"], found["confidence"]) == pytest.approx(bound)
    assert make_client(basis="pool").get("/v1/anchors/status").json()["basis"] == "prior"  # it promises nothing
    assert make_client(basis="pool", max_divergence=0.1).get("/v1/anchors/status").json()["basis"] == "pool"
    wrong = (("confidence", 1), ("confidence", 0), ("max_divergence", "nan"), ("max_divergence", 0), ("basis", "all"))
    for field, value in wrong:
        refused = make_client().get("/v1/anchors/status", params={field: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)


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
