"""Metrics: in tokens and seconds, summed over requests; and the paths that say whether the server works."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from kvcomm import __version__
from kvcomm.align.standings import Level
from kvcomm.engine.engine import Engine
from kvcomm.engine.results import ApproximationReport, Choice, Completion, Usage
from kvcomm.reuse.plan import BoundInForce
from kvcomm.reuse.policy import ReusePolicy
from tests.server.conftest import MakeClient, chat, completion

CHAT = "/v1/chat/completions"


def samples(client: TestClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name and labels."""
    text = client.get("/metrics").text
    families = text_string_to_metric_families(text)
    return {
        (each.name, tuple(sorted(each.labels.items()))): each.value for family in families for each in family.samples
    }


def test_tokens_by_source(client: TestClient) -> None:
    usages = [client.post(CHAT, json=chat()).json()["usage"] for _ in range(3)]
    found = samples(client)
    num_prompt = sum(usage["prompt_tokens"] for usage in usages)
    num_cached = sum(usage["cached_prefix_tokens"] for usage in usages)
    assert num_cached > 0
    assert found["kvcomm:prefix_cache_queries_total", ()] == num_prompt
    assert found["kvcomm:prefix_cache_hits_total", ()] == num_cached
    by_source = {source: found["kvcomm:prompt_tokens_by_source_total", (("source", source),)] for source in SOURCES}
    assert by_source == {"exact": num_cached, "aligned": 0, "computed": num_prompt - num_cached}
    assert found["kvcomm:miss_total", (("reason", "new"),)] == usages[0]["prompt_tokens"]
    assert found["kvcomm:miss_total", (("reason", "last_token"),)] == 2
    assert found["kvcomm:generation_tokens_total", ()] == 18
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert found[f"kvcomm:{name}_count", ()] == 3


SOURCES = ("exact", "aligned", "computed")


def test_requests_by_operation(client: TestClient) -> None:
    client.post(CHAT, json=chat())
    client.post(CHAT, json=chat(nonsense=1))
    client.get("/v1/models/tiny")
    client.get("/any/thing")
    client.request("BREW", "/pot")
    found = samples(client)

    def count(method: str, route: str, status: int) -> float:
        labels = (("method", method), ("route", route), ("status", str(status)))
        return found["kvcomm:http_requests_total", labels]

    assert count("POST", CHAT, 200) == count("POST", CHAT, 400) == 1
    assert count("GET", "/v1/models/{model:path}", 200) == 1
    assert count("other", "other", 404) == 2  # nobody can fill the memory with names


def test_the_pool(client: TestClient, engine: Engine) -> None:
    before = samples(client)["kvcomm:kv_cache_usage_ratio", ()]
    client.post("/v1/completions", json=completion(prompt="x" * 100))
    stats = engine.cache.stats()
    found = samples(client)
    assert found["kvcomm:kv_cache_usage_ratio", ()] == pytest.approx(1 - stats.num_free / stats.num_pages)
    assert found["kvcomm:kv_cache_usage_ratio", ()] > before
    engine.cache.set_quota(cached_tokens=8)
    assert samples(client)["kvcomm:evicted_tokens_total", (("reason", "quota"),)] > 0


def test_how_long_pages_live(client: TestClient, engine: Engine) -> None:
    def pages(name: str) -> float:
        found = samples(client)
        count = found[f"kvcomm:kv_page_{name}_seconds_count", ()]
        assert found[f"kvcomm:kv_page_{name}_seconds_bucket", (("le", "+Inf"),)] == count
        return count

    body = completion(prompt="x" * 100)
    client.post("/v1/completions", json=body)
    assert (pages("reuse_gap"), pages("lifetime")) == (0, 0)
    usage = client.post("/v1/completions", json=body).json()["usage"]
    assert pages("reuse_gap") == -(-usage["cached_prefix_tokens"] // engine.config.page_size)
    num_cached = engine.cache.stats().num_cached
    engine.cache.clear()
    assert pages("lifetime") == pages("idle_before_drop") == num_cached


def test_what_became_of_approximation(client: TestClient) -> None:
    metrics = client.app.state.kvcomm.metrics  # type: ignore[attr-defined]
    policy = ReusePolicy(max_divergence=0.02)
    report = ApproximationReport("reader", "token 15 % attention", 0.15, 0.01, 0.5, None)
    moved = Usage(10, 2, 5, 3, 1, 0.0, 0.1, 0.2, {"rung": 3}, BoundInForce(0.02, 0.05, Level.POOL, 40), report)
    nothing = BoundInForce(0.02, 0.05)
    refused = Usage(10, 2, 0, 8, 1, 0.0, 0.1, 0.2, {"uncalibrated": 6, "glue": 2}, nothing, None)
    for usage in (moved, refused):
        metrics.completed(Completion((Choice(0, "x", (1,), "stop", None),), usage), policy)
    metrics.completed(Completion((Choice(0, "x", (1,), "stop", None),), refused), ReusePolicy.exact())
    found = samples(client)
    name = "kvcomm:anchor_decisions_total"
    assert found[name, (("decision", "accepted"), ("reason", "pool"))] == 1
    assert found[name, (("decision", "refused"), ("reason", "uncalibrated"))] == 1
    assert sum(value for (each, _), value in found.items() if each == name) == 2
    assert found["kvcomm:audit_violations_total", ()] == 0


def test_apps_count_apart(make_client: MakeClient) -> None:
    first, second = make_client(), make_client()
    first.post(CHAT, json=chat())
    assert samples(second)["kvcomm:prefix_cache_queries_total", ()] == 0


def test_health_follows_the_engine(make_client: MakeClient, engine: Engine) -> None:
    client = make_client()
    assert client.get("/version").json() == {"version": __version__}
    assert client.get("/health").json() == client.get("/ready").json() == {"status": "ok"}
    engine.close()
    refused = client.post(CHAT, json=chat())
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_closed")
    for path in ("/health", "/ready"):
        assert client.get(path).status_code == 503


def test_the_names_that_routers_scrape(make_client: MakeClient, engine: Engine) -> None:
    """As vLLM means them: what is only cached is free for the next request."""
    found = samples(make_client(kv_events={"url": "tcp://*:5557", "block_size": 8}))
    mine = (("engine", "0"), ("model_name", "tiny"))
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc"):
        assert found[f"vllm:{name}", mine] == 0
    (config,) = [dict(labels) for name, labels in found if name == "vllm:cache_config_info"]
    assert (config["block_size"], config["num_gpu_blocks"]) == ("8", "512")

    client = make_client(vllm_metrics=True)
    client.post(CHAT, json=chat())
    assert engine.cache.stats().num_cached > 0
    assert samples(client)["vllm:kv_cache_usage_perc", mine] == 0
    with engine.context("x" * 100) as context:
        assert context.num_tokens > 0
        stats = engine.cache.stats()
        assert samples(client)["vllm:kv_cache_usage_perc", mine] == stats.num_in_contexts / stats.num_pages > 0


@pytest.mark.parametrize("settings", [{}, {"kv_events": {"url": "tcp://*:5557"}, "vllm_metrics": False}])
def test_only_where_they_are_wanted(make_client: MakeClient, settings: dict[str, object]) -> None:
    assert not any(name.startswith("vllm:") for name, _ in samples(make_client(**settings)))
