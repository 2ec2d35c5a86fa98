"""Load on a real server with a tiny model: what the client saw against what the engine says, and failures counted."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from openai import OpenAI

from kvcomm.engine.engine import Engine
from kvcomm.engine.request import Request
from kvcomm.errors import InvalidRequest, ServerError
from kvcomm.lab.load.client import Client
from kvcomm.lab.load.comparison import measure_overhead
from kvcomm.lab.load.running import LoadResult, run_load
from kvcomm.lab.load.workloads import Session, SessionTurn
from kvcomm.server.settings import ServerSettings
from tests.limits import PATIENCE_S, threads, wait_for
from tests.server.conftest import HELLO, MODEL
from tests.server.live import Live, serving


@pytest.fixture
def live(engine: Engine) -> Iterator[Live]:
    with serving(engine, ServerSettings(model=MODEL, port=0)) as server:
        yield server


def run(live: Live, sessions: list[Session], concurrency: int = 2) -> LoadResult:
    return run_load(Client(live.url), sessions, concurrency=concurrency, tell=lambda done: None)


def test_a_sample_is_what_the_official_client_gets(live: Live) -> None:
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", timeout=PATIENCE_S, max_retries=0) as official:
        expected = official.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=6, temperature=0)
    sample = Client(live.url).send(HELLO, 6)
    assert sample.error is None
    assert sample.text == expected.choices[0].message.content
    assert expected.usage is not None
    assert sample.output_tokens == expected.usage.completion_tokens
    assert 0 < sample.events_s[0] <= sample.events_s[-1] <= sample.total_s
    assert sorted(sample.events_s) == list(sample.events_s)


def test_a_plain_completion_is_what_the_official_client_gets(live: Live) -> None:
    """As text and as token ids."""
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", timeout=PATIENCE_S, max_retries=0) as official:
        expected = official.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=6, temperature=0)
    sample = Client(live.url).complete([5, 6, 7], 6)
    assert (sample.error, sample.text) == (None, expected.choices[0].text)
    assert sample.usage["prompt_tokens"] == 3
    assert Client(live.url).complete("how many apples?", 6, seed=1, temperature=1).output_tokens > 0


def test_a_conversation_reads_its_own_answers(live: Live) -> None:
    """Each turn finds the prompt and the answer before it in the cache."""
    turns = tuple((SessionTurn(text, 5),) for text in ("how many apples?", "and how many dogs?"))
    first, second = run(live, [Session(turns, "You are a helpful agent.", is_conversation=True)]).sent
    assert [message["role"] for message in second.messages] == ["system", "user", "assistant", "user"]
    assert second.messages[2]["content"] == first.sample.text
    cached = second.sample.usage["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first.sample.usage["prompt_tokens"]


def test_branches_are_sent_at_once_and_read_the_planner(
    live: Live, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine goes on once all branches are there: if they came one after the other, it never would."""
    submit, step, num_submitted = engine.scheduler.submit, engine.scheduler.step, [0]

    def counted_submit(request: Request) -> None:
        num_submitted[0] += 1
        submit(request)

    def step_of_all() -> None:
        wait_for(lambda: num_submitted[0] in (1, 4))  # the planner, and the others with it
        step()

    monkeypatch.setattr(engine.scheduler, "submit", counted_submit)
    monkeypatch.setattr(engine.scheduler, "step", step_of_all)
    branches = tuple(SessionTurn(f"branch {index}", 4) for index in range(3))
    planner, *others = run(live, [Session(((SessionTurn("plan", 4),), branches), is_conversation=True)], 3).sent
    assert {each.messages[1]["content"] for each in others} == {planner.sample.text}
    assert Counter(each.messages[-1]["content"] for each in others) == Counter(turn.text for turn in branches)
    starts = [each.sample.sent_s for each in others]
    assert max(starts) < min(start + each.sample.total_s for start, each in zip(starts, others, strict=True))


def test_no_more_than_so_many_at_once(live: Live) -> None:
    sessions = [Session(((SessionTurn(f"question {index}", 4),),)) for index in range(6)]
    sent = run(live, sessions, concurrency=2).sent
    times = [(each.sample.sent_s, each.sample.sent_s + each.sample.total_s) for each in sent]
    assert max(sum(begin <= at < end for begin, end in times) for at, _ in times) <= 2
    assert all(each.sample.error is None for each in sent)


def test_a_refusal_is_a_result(live: Live) -> None:
    sample = Client(live.url, model="another").send(HELLO, 4)
    assert sample.error is not None
    assert sample.error.startswith("404: ")
    assert "there is no model" in sample.error


def test_overhead_is_the_time_outside_of_the_engine(live: Live, engine: Engine) -> None:
    chats = [({"role": "user", "content": f"number {index}"},) for index in range(5)]
    told: list[str] = []
    pairs = measure_overhead(Client(live.url), engine, chats, tell=told.append)
    assert (len(pairs), told[-1]) == (3, "pair 5 of 5")
    assert all(0 < pair.inside_s < pair.server_s and pair.engine_s > 0 for pair in pairs)


CHUNK = {"choices": [{"index": 0, "delta": {"content": "word"}, "finish_reason": None}]}


class Canned(BaseHTTPRequestHandler):
    """Answers every request with the text of the test."""

    answer = b""

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, format: str, *values: Any) -> None:
        """Silent."""


@pytest.fixture
def canned() -> Iterator[type[Canned]]:
    """A server whose every answer is `canned.answer`; it listens at `canned.url`."""
    handler: Any = type("Handler", (Canned,), {})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        handler.url = f"http://127.0.0.1:{server.server_port}"
        with threads(server.serve_forever):
            try:
                yield handler
            finally:
                server.shutdown()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (f"data: {json.dumps(CHUNK)}\n\n", "the stream broke off"),
        ("data: nonsense\n\n", "not a stream of answers"),
        ('data: {"choices": [{}]}\n\n', "not a stream of answers"),
        ('data: {"error": {"message": "full"}}\n\n', "in the stream: {'message': 'full'}"),
        ("", "the stream broke off"),
    ],
)
def test_a_stream_that_is_none(canned: Any, answer: str, error: str) -> None:
    canned.answer = answer.encode()
    sample = Client(canned.url, model="any").send(HELLO, 4)
    assert sample.error is not None
    assert sample.error.startswith(error)


def test_a_server_that_counts_nothing(canned: Any) -> None:
    canned.answer = f"data: {json.dumps(CHUNK)}\n\ndata: {json.dumps(CHUNK)}\n\ndata: [DONE]\n\n".encode()
    sample = Client(canned.url, model="any").send(HELLO, 4)
    assert (sample.error, sample.text, sample.output_tokens) == (None, "wordword", 2)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    sample = Client(url, model="any").send(HELLO, 4)
    assert sample.error is not None
    assert sample.error.startswith("ConnectionRefusedError")
    with pytest.raises(ServerError, match="does not list its models"):
        Client(url)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://"])
def test_no_url(url: str) -> None:
    with pytest.raises(InvalidRequest, match="is no URL of a server"):
        Client(url)
