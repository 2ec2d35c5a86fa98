"""Arguments of the app: what they are, and that wrong ones are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcomm.errors import InvalidRequest
from kvcomm.integrations.ray.settings import read_arguments


def test_arguments_are_texts_or_values_of_yaml(tmp_path: Path) -> None:
    given = {"model": "smollm2-135m", "replicas": "2", "tier": str(tmp_path), "engine.pool_tokens": "4096"}
    settings, server = read_arguments(given)
    assert (settings.replicas, server.model, server.tier) == (2, "smollm2-135m", str(tmp_path))
    assert server.engine.pool_tokens == 4096
    other, same = read_arguments({**given, "replicas": 2, "engine": {"pool_tokens": 4096}, "engine.pool_tokens": 4096})
    assert (other, same) == (settings, server)


def test_a_file_has_what_the_arguments_leave_out(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("max_requests = 7\ndefault_max_tokens = 9\n")
    settings, server = read_arguments({"config": str(file), "default_max_tokens": "3", "requests_per_replica": "5"})
    assert (server.max_requests, server.default_max_tokens, settings.requests_per_replica) == (7, 3, 5)


def test_autoscaling_is_off_unless_there_is_a_maximum() -> None:
    assert read_arguments({"replicas": "3"})[0].autoscaling() is None
    found = read_arguments({"replicas": "2", "max_replicas": "5", "target_requests": "4"})[0].autoscaling()
    assert found is not None
    assert (found["min_replicas"], found["initial_replicas"], found["max_replicas"]) == (2, 2, 5)
    assert found["target_ongoing_requests"] == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"modle": "x"}, "unknown argument 'modle'; known: .*model.*replicas.*tier"),
        ({"replicas": "0"}, "replicas=0: .*greater than or equal to 1"),
        ({"replicas": "two"}, "replicas=two"),
        ({"replicas": "3", "max_replicas": "2"}, "max_replicas is 2, less than replicas, 3"),
        ({"cpus": "nan"}, "cpus=nan"),
        ({"port": "8000"}, "port is Ray Serve's"),
        ({"default_temperature": "9"}, "'default_temperature' among the app's arguments: .*less than or equal to 2"),
        ({"engine.pages": "9"}, "pages"),
        ({"served_name": "x", "served_name.y": "9"}, "served_name is no table"),
        ({"tier_secret_file": "secret"}, "no use without tier"),
        ({"config": "/nowhere/server.toml"}, "/nowhere/server.toml cannot be read"),
        ({"cors_origins": "*"}, "without keys"),
    ],
)
def test_wrong_arguments_are_refused_by_name(given: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        read_arguments(given)
    assert "\n" not in str(refused.value)
