"""One answer of those of all replicas."""

from __future__ import annotations

import json

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvcomm.integrations.ray.gathering import listed, metrics_of
from kvcomm.integrations.ray.messages import Whole


def metrics(replica: str, count: int) -> Whole:
    registry = CollectorRegistry()
    counter = Counter("requests", 'of "clients"\nand others', ["code"], registry=registry)
    counter.labels(code='a "quoted" {one}').inc(count)
    Histogram("seconds", "taken", registry=registry).observe(count)
    Counter("plain", "without labels", registry=registry).inc(count)
    return Whole(replica, 200, [(b"content-length", b"1")], generate_latest(registry))


def test_metrics_of_replicas_stand_side_by_side() -> None:
    whole = metrics_of([metrics("b", 3), metrics("a", 2)])
    assert dict(whole.headers)[b"content-length"] == str(len(whole.body)).encode()
    families = {each.name: each for each in text_string_to_metric_families(whole.body.decode())}
    assert set(families) >= {"requests", "seconds", "plain"}
    for name, label in (("requests", {"code": 'a "quoted" {one}'}), ("plain", {})):
        found = {
            (sample.labels.pop("replica"), sample.value, tuple(sample.labels.items()))
            for sample in families[name].samples
            if sample.name == f"{name}_total"
        }
        assert found == {("a", 2.0, tuple(label.items())), ("b", 3.0, tuple(label.items()))}
    assert sum(sample.name == "seconds_count" for sample in families["seconds"].samples) == 2


def test_lists_are_joined() -> None:
    answers = [
        Whole(
            name, 200, [(b"content-type", b"application/json")], json.dumps({"object": "list", "data": data}).encode()
        )
        for name, data in (("a", [1, 2]), ("b", []), ("c", ["ä"]))
    ]
    assert json.loads(listed(answers).body) == {"object": "list", "data": [1, 2, "ä"]}
