"""The scenarios about bodies and about crowds: what they send is what they say, and they see what they look for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.resilience import bodies as scenario
from eval.resilience.__main__ import main
from eval.resilience.bodies import BODY_BYTES, _send, _watched, large_bodies
from eval.resilience.crowd import _ask_all, _half_sent
from eval.resilience.questions import Question
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.server.keys import KeyRing, add_key
from kvcomm.server.settings import Limits, ServerSettings
from tests.server.live import serving
from tests.tiny import save_tiny_model, tiny_model

CHAT = ({"role": "user", "content": "how many apples are left?"},)
NO_JSON = {"depth", "not_closed"}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = tiny_model()
    with Engine(made.model, made.tokenizer, config=EngineConfig(page_size=4, pool_tokens=4096)) as engine:
        yield engine


def test_bodies_are_as_large_as_a_server_takes() -> None:
    most = ServerSettings().max_body_bytes
    names, all_sent = set(), list(large_bodies("tiny"))
    for sent in all_sent:
        assert BODY_BYTES * 0.85 < len(sent.body) <= most, sent.name
        names.add(sent.name)
        if sent.name not in (*NO_JSON, "digits"):
            json.loads(sent.body)
    assert len(names) == len(all_sent)


def test_each_body_has_an_answer_in_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones of every kind: none is an error of the server, and the ones that are valid say so."""
    monkeypatch.setattr(scenario, "BODY_BYTES", 4096)
    with serving(engine, ServerSettings(model="tiny", port=0)) as live:
        statuses = {sent.name: _send(live.url, sent) for sent in large_bodies("tiny")}
        with _watched(live.url) as seconds:
            pass
    assert set(statuses.values()) <= {200, 400, 404}
    assert statuses["prediction"] == 200
    assert all(second > 0 for second in seconds)


def test_refused_neighbours_are_seen(engine: Engine, tmp_path: Path) -> None:
    greedy, modest = add_key(tmp_path / "k", "greedy"), add_key(tmp_path / "k", "modest", limits=Limits(max_requests=1))
    with serving(engine, ServerSettings(model="tiny", port=0), keys=KeyRing(tmp_path / "k")) as live:
        asked = [Question(CHAT, "", 50)]
        with _half_sent(live.url, greedy):
            assert {each.status for each in _ask_all(live.url, greedy, "tiny", asked)} == {429}
        with _half_sent(live.url, modest):
            assert {each.status for each in _ask_all(live.url, modest, "tiny", asked)} == {429}


@pytest.mark.slow
def test_both_scenarios(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenario, "CALM_S", 1.0)
    monkeypatch.setattr(scenario, "ROUNDS", 1)
    model = save_tiny_model(tmp_path / "model")
    command = [f"--model={model}", "--questions=2", "--prefix-len=16", "--scenarios=bodies,crowd", "--json"]
    assert main([*command, f"--out={tmp_path / 'run.json'}"]) == 0
    values = {figure["id"]: figure["value"] for figure in json.loads(capsys.readouterr().out)["figures"]}
    assert values["neighbours_refused"] == 0
    assert values["neighbours_asked"] == 8
    assert values["body_amplification"] <= 20
    assert values["health_stall_ms"] >= 0
