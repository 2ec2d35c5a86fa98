"""Requests that name an answer in progress: they read it while it is written, and answer as if its text had been sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from kvcomm.engine.engine import Engine
from kvcomm.server.followed import ENDED_S, MAX_ENDED, Source, Sources
from kvcomm.server.keys import KeyRing, add_key
from kvcomm.server.settings import ServerSettings
from tests.engine.conftest import greedy
from tests.limits import PATIENCE_S, wait_for
from tests.server.conftest import HELLO, MODEL, chat, completion
from tests.server.live import Live, serving
from tests.stalling import stalling

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PLAN = "The quick brown fox"


class Producer:
    """A streamed answer that stands still as soon as its first tokens are out."""

    def __init__(self, client: httpx.Client, path: str, body: dict[str, Any], **headers: str) -> None:
        self._request = client.stream("POST", path, json={**body, "stream": True}, headers=headers)
        self._response = self._request.__enter__()
        self._lines = self._response.iter_lines()
        first = next(line for line in self._lines if line.startswith("data: "))
        event = json.loads(first.removeprefix("data: "))
        self.id = str((event.get("response") or event.get("message") or event)["id"])

    def read(self) -> None:
        """Read it to its end."""
        for _ in self._lines:
            pass
        self.close()

    def close(self) -> None:
        """Be done with it, also before it has ended."""
        self._request.__exit__(None, None, None)


@pytest.fixture
def http(live: Live) -> Iterator[httpx.Client]:
    """A client of the server."""
    with httpx.Client(base_url=live.url, timeout=PATIENCE_S) as made:
        yield made


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for requests that have to wait."""
    with ThreadPoolExecutor(8) as made:
        yield made


def following(source: str, **fields: Any) -> dict[str, Any]:
    """A completion that stands behind an answer."""
    segments = [{"id": "role", "content": "You are a helpful agent. "}, {"id": "plan", "response_id": source}]
    return completion(prompt="Answer:", segments=segments, ignore_eos=True, **fields)


def opened(engine: Engine, number: int = 1) -> None:
    """Wait until so many prompts are open."""
    wait_for(lambda: len(engine.scheduler.read_along.readings) >= number)


def expected(engine: Engine, answer: list[int], *, max_tokens: int = 6) -> str:
    """What the stock model says to the prompt of `following`."""
    plain = [token for token in answer if token not in engine.tokenizer.all_special_ids]
    ids = [
        *engine.segment("You are a helpful agent. ").token_ids,
        *plain,
        *engine.segment("Answer:").token_ids,
    ]
    text = engine.tokenizer.decode(greedy(engine.model, ids, max_tokens), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def plan_of(engine: Engine, num_tokens: int) -> list[int]:
    """The stock model's answer that is followed."""
    return greedy(engine.model, list(engine.segment(PLAN).token_ids), num_tokens)


def begun(http: httpx.Client, num_tokens: int = 24, **headers: str) -> Producer:
    """The answer that is followed."""
    return Producer(http, COMPLETIONS, completion(prompt=PLAN, max_tokens=num_tokens, ignore_eos=True), **headers)


def text_of(response: Future[httpx.Response]) -> str:
    """The text of a completion that must be one."""
    answer = response.result(PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    """Status, code and parameter of an error."""
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def test_an_answer_in_progress_is_read_as_if_it_had_been_sent(
    http: httpx.Client, engine: Engine, pool: ThreadPoolExecutor
) -> None:
    with stalling(engine, written=3) as go_on:
        producer = begun(http)
        readers = [pool.submit(http.post, COMPLETIONS, json=following(producer.id)) for _ in range(3)]
        opened(engine, 3)
        assert not any(reader.done() for reader in readers)
        go_on.set()
        producer.read()
        wanted = expected(engine, plan_of(engine, 24))
        assert [text_of(reader) for reader in readers] == [wanted] * 3
    usage = readers[0].result().json()["usage"]
    assert usage["read_along_tokens"] > 0
    assert usage["read_along_tokens"] <= usage["computed_tokens"]
