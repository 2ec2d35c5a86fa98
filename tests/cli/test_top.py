"""`kvcomm top` against a server: the tenant's numbers, once for a pipe, again and again on a terminal."""

from __future__ import annotations

import itertools
import json
import math
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvcomm.cli import app
from kvcomm.cli.output import format_bytes
from kvcomm.cli.top_view import quantile, sparkline, view
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.server.keys import KeyRing, add_key
from kvcomm.server.schemas.stats import Stats, TtftHistogram
from kvcomm.server.settings import ServerSettings
from tests.limits import PATIENCE_S, process, wait_for
from tests.server.live import Live, serving
from tests.tiny import tiny_model


@pytest.fixture
def engine() -> Iterator[Engine]:
    """A tiny engine."""
    tiny = tiny_model()
    with Engine(tiny.model, tiny.tokenizer, config=EngineConfig(page_size=4, pool_tokens=1024)) as made:
        yield made


@pytest.fixture
def live(engine: Engine) -> Iterator[Live]:
    """A server without keys that has answered twice."""
    with serving(engine, ServerSettings(model="tiny", port=0)) as running:
        for _ in range(2):
            ask(running)
        yield running


def ask(live: Live, **headers: str) -> None:
    """One request."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "[red]hello"}], "max_tokens": 3}
    assert (
        httpx2.post(f"{live.url}/v1/chat/completions", json=body, headers=headers, timeout=PATIENCE_S).status_code
        == 200
    )


def drawn(stats: Stats, **settings: Any) -> str:
    """The view as text."""
    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        console.print(view(stats, **settings))
    return capture.get()


def test_json_is_the_servers_answer(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["top", "--server", live.url, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = httpx2.get(f"{live.url}/v1/stats", timeout=PATIENCE_S).json()
    for moving in ("uptime_s", "recent", "last_minute", "curves"):
        assert len(str(found.pop(moving))) > 0
        expected.pop(moving)
    assert found == expected


def test_a_pipe_gets_one_look(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["top", "--server", f"{live.url}/"]) == 0
    tokens = live.state.tenants.get().tally.tokens
    shown = capsys.readouterr().out
    assert "kvcomm tiny" in shown
    assert f"exact {tokens['exact'] / tokens.total():.1%} ({tokens['exact']})" in shown
    assert "last_token" in shown


def test_each_tenant_sees_its_own(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    ann, bob = (add_key(file, name) for name in ("ann", "bob"))
    with serving(engine, ServerSettings(model="tiny", port=0), keys=KeyRing(file)) as live:
        ask(live, authorization=f"Bearer {ann}")
        for key, number in ((ann, 1), (bob, 0)):
            assert app.run(["top", "--server", live.url, "--key", key, "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["requests"] == number
        assert app.run(["top", "--server", live.url]) == 1
    assert "answered 401: no API key" in capsys.readouterr().err


def test_another_kind_of_server(
    live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvcomm.cli.top.get_json", lambda url, key: {"object": "stats"})
    assert app.run(["top", "--server", live.url]) == 1
    assert "does not understand: model: Field required" in capsys.readouterr().err


def test_a_terminal_is_drawn_until_interrupted(live: Live) -> None:
    """Through a pseudo terminal: it follows the server, and gives the screen back at Ctrl-C."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "kvcomm", "top", "--server", live.url, "--interval", "0.2"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    seen = bytearray()

    def read() -> bool:
        """Whether there was something to read, and not the end: Linux tells of it by an error."""
        assert select.select([ours], [], [], PATIENCE_S)[0]
        try:
            seen.extend(os.read(ours, 65_536))
        except OSError:
            return False
        return True

    try:
        with process(command, stdout=theirs, stderr=subprocess.PIPE, env=environment) as top:
            os.close(theirs)
            wait_for(lambda: not read() or b"2 requests" in seen)
            ask(live)
            wait_for(lambda: not read() or b"3 requests" in seen)
            top.send_signal(signal.SIGINT)
            while read():
                pass
            assert top.wait(PATIENCE_S) == 130
            assert top.stderr.read() == b""
    finally:
        os.close(ours)
    assert b"3 requests" in seen
    assert b"\x1b[?1049l" in seen  # back from the alternate screen


def test_what_is_kept_is_drawn() -> None:
    kept = {
        "contexts": 3,
        "max_contexts": 1024,
        "context_tokens": 77,
        "conversation_bytes": 2048,
        "max_kept_bytes": 64 * 2**20,
        "segments": 1,
        "max_segments": 1024,
        "segment_bytes": 10,
        "max_segment_bytes": 100,
    }
    text = drawn(some_stats(kept=kept))
    assert "3 of 1024, 77 tokens" in text
    assert f"{format_bytes(2048)} of {format_bytes(64 * 2**20)}" in text
    assert "their texts" not in drawn(some_stats())


def some_stats(**fields: Any) -> Stats:
    """Stats with something in every part."""
    tokens = {"exact": 50, "aligned": 30, "computed": 20}
    values: dict[str, Any] = {
        "model": "m",
        "uptime_s": 100.0,
        "requests": 1,
        "requests_in_flight": 0,
        "generated_tokens": 10,
        "tokens": tokens,
        "miss_reasons": {"new": 20},
        "ttft": {"bounds_s": [0.1, 1.0], "counts": [0, 1, 0], "sum_s": 0.5},
        "recent": [
            {"ago_s": 1, "tokens": tokens, "generated_tokens": 3, "ttft_s": 0.5, "total_s": 1, "miss_reasons": {}}
        ],
        "cache": {
            "tokens": 90, "bytes": 9_000_000, "quota_tokens": 100, "evicted_tokens": 5, "expired_tokens": 0,
            "over_quota_tokens": 0,
        },
        "evictions": [{"ago_s": 2, "start": 0, "tokens": 5, "reason": "evicted", "label": "[red]bad\x1b[2J\ntext"}],
        "bounds": [
            {"reader": None, "slots": [], "level": "prior", "max_divergence": 0.02, "confidence": 0.95,
             "num_pairs": 240, "num_needed": 19, "working_delta": 0.05, "num_audited": 0, "num_violations": 0,
             "tripped": False},
            {"reader": "0123456789", "slots": ["[red]doc\x1b"], "level": "own", "max_divergence": 0.02,
             "confidence": 0.95, "num_pairs": 7, "num_needed": 19, "working_delta": 0.01, "num_audited": 4,
             "num_violations": 1, "tripped": True},
            {"reader": "9876543210", "slots": [], "level": "own", "max_divergence": 0.02, "confidence": 0.95,
             "num_pairs": 7, "num_needed": 19, "working_delta": -0.01, "num_audited": 4, "num_violations": 2,
             "tripped": False},
        ],
        "readers": [],
        "audits": [],
    }  # fmt: skip
    return Stats.model_validate(values | fields)


def test_every_part_is_drawn() -> None:
    shown = drawn(some_stats())
    first_bar = shown.splitlines()[2].strip()
    assert [first_bar.count(shade) for shade in "█▒░"] == [30, 18, 12]
    for words in ("exact 50.0% (50)", "<= 1 s", "9.0 MB", "100 tokens", "evicted so far"):
        assert words in shown
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert "all prior 0.02 0.95 240 0 0 holds" in rows
    assert "01234567 [red]doc� own 0.02 0.95 7 of 19 4 1 tripped" in rows
    assert "98765432 own 0.02 0.95 7 of 19 4 2 paused" in rows
    assert "[red]bad\ufffd[2J text" in shown  # neither markup nor control characters


def test_endings_and_refusals_are_drawn() -> None:
    refused = {
        "ago_s": 3, "method": "POST", "path": "/v1/\x1bx", "status": 400, "code": "unknown_parameter", "param": None,
        "message": "[red]unknown\nparameter", "request_id": "r",
    }  # fmt: skip
    reasons = {"stop": 7, "tool_calls": 9, "\x1b[2J": 1}
    rows = [
        " ".join(line.split()) for line in drawn(some_stats(finish_reasons=reasons, refused=[refused])).splitlines()
    ]
    assert "3 s POST /v1/\ufffdx 400 unknown_parameter [red]unknown parameter" in rows
    assert any("tool_calls 9" in row for row in rows)
    assert any("\ufffd[2J 1" in row for row in rows)
    assert "refused" not in drawn(some_stats())


def test_the_last_minute_and_curves_are_drawn() -> None:
    minute = {"seconds": 50.0, "requests": 4, "refused": 2, "prompt_tokens": 500, "reused_tokens": 9}
    curves = {name: [0, 1, 4, 8] for name in ("requests", "refused", "reused_tokens", "generated_tokens")}
    stats = some_stats(
        last_minute=minute | {"generated_tokens": 25}, curves=curves | {"step_s": 10, "prompt_tokens": [0, 0, 0, 0]}
    )
    text = drawn(stats)
    assert "last minute: 4 requests, 10 prompt and 0.5 generated tokens/s, 2 refused" in text
    assert " ▁▄█ " in text
    assert "last 40 s, steps of 10 s" in text


@given(st.lists(st.integers(0, 10**9)))
def test_sparklines(steps: list[int]) -> None:
    line = sparkline(steps)
    assert len(line) == len(steps)
    for (step, block), (other, lower) in itertools.product(zip(steps, line, strict=True), repeat=2):
        assert (block == " ") == (step == 0)
        assert step <= other or block >= lower
    assert not any(steps) or "█" in line


def test_rates_since_the_last_look() -> None:
    before = some_stats()
    after = some_stats(uptime_s=102.0, tokens={"exact": 150, "aligned": 30, "computed": 40}, generated_tokens=15)
    assert "now 60 prompt and 2.5 generated tokens/s" in drawn(after, before=before)
    assert "now" not in drawn(before, before=after)  # the server has been started anew


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ([0, 0, 0], 0.5, None),
        ([1, 1, 0], 0.5, 0.1),
        ([1, 1, 0], 0.51, 1.0),
        ([99, 0, 1], 0.99, 0.1),
        ([98, 1, 1], 0.999, math.inf),
    ],
)
def test_quantiles(counts: list[int], share: float, expected: float | None) -> None:
    assert quantile(TtftHistogram(bounds_s=[0.1, 1.0], counts=counts, sum_s=0), share) == expected
