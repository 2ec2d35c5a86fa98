"""What of the adapter needs no vLLM, and what it says where there is none."""

from __future__ import annotations

import json
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from kvcomm.cli.app import run
from kvcomm.errors import UnsupportedModel
from kvcomm.integrations.vllm import adapter, layout, needed, plugin
from kvcomm.integrations.vllm.fair_lock import FairLock


class Request(SimpleNamespace):
    """A request whose block hashes are made of its salt."""

    def update_block_hashes(self) -> None:
        self.block_hashes.extend((self.cache_salt, each) for each in range(len(self.block_hashes), 3))


def request(**changes: Any) -> Request:
    fields = {"cache_salt": None, "prompt_token_ids": [1, 2], "block_hashes": [(None, 0), (None, 1), (None, 2)]}
    return Request(**fields | changes)


def test_private_blocks_have_names_of_their_own() -> None:
    first, second = request(), request()
    adapter.isolate(first)
    adapter.isolate(second)
    names = {*first.block_hashes, *second.block_hashes}
    assert len(names) == 6
    assert not names & {(None, 0), (None, 1), (None, 2)}
    assert adapter.why_foreign(first) is None  # its salt is ours


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"cache_salt": "mine"}, "its client's own salt"),
        ({"lora_request": object()}, "lora"),
        ({"mm_features": [object()]}, "not text alone"),
        ({"prompt_embeds": object()}, "not text alone"),
        ({"prompt_token_ids": None}, "not a prompt of tokens"),
        ({"pooling_params": object()}, "not a prompt of tokens"),
        ({"skip_reading_prefix_cache": True}, "it reads no cache"),
        ({}, None),
    ],
)
def test_whose_tokens_say_all(changes: dict[str, Any], why: str | None) -> None:
    assert adapter.why_foreign(request(**changes)) == why


@pytest.mark.parametrize(
    ("found", "is_tried"),
    [("0.32.0", True), ("0.32.3+cpu", True), ("0.31.9", False), ("0.33.0", False), ("1.0", False), ("dev", False)],
)
def test_versions(found: str, is_tried: bool) -> None:
    assert needed.is_tried_version(found) is is_tried


def test_steps_and_passes_take_turns() -> None:
    turns, log = FairLock(), []

    class Runner:
        def execute_model(self, scheduler_output: Any, more: int) -> str:
            log.append(("step", scheduler_output.total_num_scheduled_tokens, more, len(turns._queue)))
            return "output"

        def sample_tokens(self, grammar: object) -> str:
            log.append(("sample", grammar, len(turns._queue)))
            return "tokens"

    runner = Runner()
    adapter.take_turns(runner, turns, lambda: log.append(("empty", len(turns._queue))))
    assert runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=5), 1) == "output"
    assert runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=0), more=2) == "output"
    assert runner.sample_tokens(None) == "tokens"
    assert log == [("step", 5, 1, 1), ("empty", 0), ("step", 0, 2, 1), ("sample", None, 1)]


def test_only_pairs_that_were_compared_are_exact() -> None:
    assert not layout.Probe(None).is_exact
    assert not layout.Probe(2e-4).is_exact
    assert not layout.Probe(float("nan")).is_exact
    assert layout.Probe(2e-5).is_exact


def test_another_vllm_is_refused_by_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needed, "version", lambda: "0.40.0")
    monkeypatch.setattr(needed, "NAMES", {"json": ("dumps", "load_pages")})
    monkeypatch.setattr(needed, "MEMBERS", {("json", "JSONDecoder"): ("decode", "page")})
    assert needed.missing_names() == ["json.load_pages", "json.JSONDecoder.page"]
    with pytest.raises(UnsupportedModel, match=r"vLLM 0\.40\.0 lacks json\.load_pages, .*written for vLLM >= 0\.32"):
        needed.require_known()
    assert not needed.look().serves
    plugin.register()  # stays out, and lets vLLM start


def test_a_known_vllm_of_an_untried_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needed, "version", lambda: "0.33.1")
    monkeypatch.setattr(needed, "NAMES", {})
    monkeypatch.setattr(needed, "MEMBERS", {})
    found = needed.look()
    assert found.serves
    assert "not tried with this version" in found.reason


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_doctor_without_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--vllm", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["vllm"]
    assert found["serves"] is False
    assert "vLLM cannot be imported here" in found["reason"]
