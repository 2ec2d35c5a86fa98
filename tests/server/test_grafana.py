"""The Grafana dashboard against what `/metrics` really has: names, labels, and that nothing is left out."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import Any

from starlette.testclient import TestClient

from tests.server.conftest import chat

DASHBOARD: dict[str, Any] = json.loads((files("kvcomm.server") / "grafana.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
NOT_SHOWN = {
    "kvcomm:kv_cache_cached_pages",
    "kvcomm:http_request_duration_seconds",
    "kvcomm:prompt_tokens_read_along_total",  # one of the reasons for which tokens were computed
}


def exposed(client: TestClient) -> dict[str, set[str]]:
    """Types of metrics that the server documents, by name; as a query spells those that it asks for."""
    client.post("/v1/chat/completions", json=chat())
    lines = client.get("/metrics").text.splitlines()
    types = [line.split()[2:4] for line in lines if line.startswith("# TYPE kvcomm:")]
    suffixes = {"counter": {""}, "gauge": {""}, "histogram": {"_bucket", "_count", "_sum"}}
    return {name: {name + suffix for suffix in suffixes[kind]} for name, kind in types if not name.endswith("_created")}


def test_every_query_asks_for_what_there_is(client: TestClient) -> None:
    known = set().union(*exposed(client).values())
    asked = {name for expression in EXPRESSIONS for name in re.findall(r"kvcomm:\w+", expression)}
    assert asked
    assert asked <= known


def test_every_metric_is_shown(client: TestClient) -> None:
    text = "\n".join(EXPRESSIONS)
    assert {name for name, spelled in exposed(client).items() if not any(each in text for each in spelled)} == NOT_SHOWN


def test_labels_are_those_of_the_metrics(client: TestClient) -> None:
    exposed(client)
    metrics = client.get("/metrics").text
    for labels, name in re.findall(r"sum by \((.*?)\) \(rate\((kvcomm:\w+)\{", "\n".join(EXPRESSIONS)):
        lines = [line for line in metrics.splitlines() if line.startswith(name + "{")]
        for label in labels.split(", "):
            assert all(f'{label}="' in line for line in lines), (name, label)


def test_panels_stand_side_by_side() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
