"""Requests that name an answer in progress: read while it is written, answered as if its text had been sent."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from kvcomm.engine.engine import Engine
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.results import Choice, Completion, Usage
from kvcomm.server.followed import ENDED_S, MAX_ENDED, FollowedAnswer, FollowedAnswers
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


def ended_handle(token_id: int) -> RequestHandle:
    """Of a request that answered one token."""
    handle = RequestHandle(0, lambda: None)
    usage = Usage(1, 0, 0, 1, 1, 0.0, 0.0, 0.0)
    handle.settle(Completion((Choice(0, "", (token_id,), "stop", None),), usage))
    return handle


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
    reasons = usage["miss_reasons"]
    assert reasons.get("read_along", 0) == usage["read_along_tokens"] <= usage["computed_tokens"]
    assert sum(reasons.values()) == usage["computed_tokens"]
    assert usage["prompt_tokens"] == usage["cached_prefix_tokens"] + usage["computed_tokens"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_chats_follow_and_are_followed(
    http: httpx.Client, engine: Engine, pool: ThreadPoolExecutor, is_stream: bool
) -> None:
    """A chain: an answer in progress, a chat that follows it, and one that follows that chat."""
    with stalling(engine, written=2) as go_on:
        first = Producer(http, CHAT, chat(max_tokens=12, ignore_eos=True))
        body = chat(segments=[{"id": "plan", "response_id": first.id}], stream=is_stream)
        second = pool.submit(http.post, CHAT, json=body, headers={"x-request-id": "second"})
        opened(engine)
        third = pool.submit(http.post, CHAT, json=chat(segments=[{"id": "it", "response_id": "second"}]))
        opened(engine, 2)
        go_on.set()
        first.read()
        assert second.result(PATIENCE_S).status_code == third.result(PATIENCE_S).status_code == 200
    if not is_stream:
        message = second.result().json()["choices"][0]["message"]["content"]
        sent = http.post(CHAT, json=chat(segments=[{"id": "plan", "response_id": first.id}]))
        assert sent.json()["choices"][0]["message"]["content"] == message


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(ignore_eos=True, max_tokens=24)),
        ("/v1/responses", {"model": MODEL, "input": "how many?", "max_output_tokens": 24, "ignore_eos": True}),
        ("/v1/messages", {"model": MODEL, "messages": HELLO, "max_tokens": 24}),
    ],
)
def test_every_surface_hands_out_ids(
    http: httpx.Client, engine: Engine, pool: ThreadPoolExecutor, path: str, body: dict[str, Any]
) -> None:
    with stalling(engine, written=2) as go_on:
        producer = Producer(http, path, body)
        reader = pool.submit(http.post, COMPLETIONS, json=following(producer.id))
        wait_for(lambda: reader.done() or len(engine.scheduler.read_along.readings) >= 1)
        go_on.set()
        producer.read()
        text = text_of(reader)
    assert text_of(pool.submit(http.post, COMPLETIONS, json=following(producer.id))) == text


def test_the_answer_that_a_context_is_extended_with_is_followed(
    http: httpx.Client, engine: Engine, pool: ThreadPoolExecutor
) -> None:
    context = http.post("/v1/contexts", json={"model": MODEL, "text": PLAN}).json()["id"]
    segments = [{"id": "role", "content": "You are a helpful agent. "}, {"id": "plan", "context_id": context}]
    reading = completion(prompt="Answer:", segments=segments, ignore_eos=True)
    assert error_of(http.post(COMPLETIONS, json=reading)) == (404, "response_not_found", "segments[1].context_id")
    with stalling(engine, written=2) as go_on:
        body = completion(prompt="", context_id=context, store=True, max_tokens=24, ignore_eos=True)
        producer = Producer(http, COMPLETIONS, body)
        reader = pool.submit(http.post, COMPLETIONS, json=reading)
        opened(engine)
        go_on.set()
        producer.read()
        assert text_of(reader) == expected(engine, plan_of(engine, 24))
    assert text_of(pool.submit(http.post, COMPLETIONS, json=reading)) == expected(engine, plan_of(engine, 24))


def test_a_follower_that_comes_a_moment_late_finds_the_final_ids(http: httpx.Client, engine: Engine) -> None:
    body = completion(prompt=PLAN, max_tokens=24, ignore_eos=True)
    whole = http.post(COMPLETIONS, json=body, headers={"x-request-id": "plan"}).json()
    for name in ("plan", whole["id"]):
        answer = http.post(COMPLETIONS, json=following(name)).json()
        assert answer["choices"][0]["text"] == expected(engine, plan_of(engine, 24))
        assert answer["usage"]["read_along_tokens"] == 0


def test_what_a_stop_string_cuts_is_not_read(http: httpx.Client, engine: Engine, pool: ThreadPoolExecutor) -> None:
    """The follower reads the ids of the answer as its client got it; with the text sent it answers the same."""
    ids = plan_of(engine, 24)
    text = engine.tokenizer.decode(ids[:16], skip_special_tokens=True)
    assert isinstance(text, str)
    stop = text[-2:]
    with stalling(engine, written=3) as go_on:
        body = completion(prompt=PLAN, max_tokens=24, ignore_eos=True, stop=[stop])
        producer = Producer(http, COMPLETIONS, body)
        reader = pool.submit(http.post, COMPLETIONS, json=following(producer.id))
        opened(engine)
        go_on.set()
        producer.read()
        text = text_of(reader)
    cut = http.post(COMPLETIONS, json=body).json()["choices"][0]["text"]
    assert stop not in cut
    late = http.post(COMPLETIONS, json=following(producer.id)).json()
    assert late["choices"][0]["text"] == text
    assert late["usage"]["prompt_tokens"] == reader.result().json()["usage"]["prompt_tokens"]


def test_an_empty_answer_leaves_the_rest(http: httpx.Client, engine: Engine) -> None:
    first = http.post(COMPLETIONS, json=completion(prompt=PLAN, max_tokens=0)).json()
    answer = http.post(COMPLETIONS, json=following(first["id"])).json()
    assert answer["choices"][0]["text"] == expected(engine, [])


@pytest.mark.parametrize("ending", ["left", "failed"])
def test_a_followed_answer_that_comes_to_nothing_is_one_clear_error(
    http: httpx.Client, engine: Engine, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    with stalling(engine, written=3) as go_on:
        producer = begun(http)
        reader = pool.submit(http.post, COMPLETIONS, json=following(producer.id))
        opened(engine)
        if ending == "left":
            producer.close()
        else:
            (request,) = engine.scheduler.requests()
            monkeypatch.setattr(request, "completion", lambda *arguments: {}["odd"])
        go_on.set()
        if ending == "failed":
            producer.read()
        assert error_of(reader.result(PATIENCE_S)) == (409, "source_failed", "segments")
    answer = http.post(COMPLETIONS, json=following(producer.id))
    assert error_of(answer) == (404, "response_not_found", "segments[1].response_id")


def test_an_answer_that_does_not_end_in_time_is_not_waited_for(engine: Engine, pool: ThreadPoolExecutor) -> None:
    settings = ServerSettings(model=MODEL, port=0, follow_timeout_s=0.01)
    with serving(engine, settings) as live, httpx.Client(base_url=live.url, timeout=PATIENCE_S) as http:
        with stalling(engine, written=3) as go_on:
            producer = begun(http)
            reader = pool.submit(http.post, COMPLETIONS, json=following(producer.id))
            opened(engine)
            due = [each.due_s for each in engine.scheduler.read_along.readings]
            wait_for(lambda: all(time.monotonic() > each for each in due))
            go_on.set()
            assert error_of(reader.result(PATIENCE_S)) == (409, "source_failed", "segments")
            producer.read()
        wait_for(lambda: live.state.admission.num_in_flight == 0)


def test_a_client_that_leaves_gives_its_open_prompt_up(http: httpx.Client, live: Live, engine: Engine) -> None:
    with stalling(engine, written=3) as go_on:
        producer = begun(http)
        connection = live.post(json.dumps(following(producer.id)).encode(), COMPLETIONS)
        opened(engine)
        connection.close()
        wait_for(lambda: live.state.tenants.get().num_requests == 1 or not engine.scheduler.read_along.readings)
        go_on.set()
        producer.read()
    wait_for(lambda: live.state.admission.num_in_flight == 0)
    assert engine.scheduler.read_along.readings == []


def test_nobody_follows_what_is_anothers(engine: Engine, tmp_path: Path) -> None:
    """Another tenant's id, and one of another salt, are as unknown as one that never was."""
    file = tmp_path / "keys.json"
    ann, bob = ({"authorization": f"Bearer {add_key(file, name)}"} for name in ("ann", "bob"))
    with serving(engine, ServerSettings(model=MODEL, port=0), keys=KeyRing(file)) as live:
        with httpx.Client(base_url=live.url, timeout=PATIENCE_S) as http:
            with stalling(engine, written=3) as go_on:
                producer = begun(http, **ann)
                unknown = http.post(COMPLETIONS, json=following("cmpl-0"), headers=bob)
                others = http.post(COMPLETIONS, json=following(producer.id), headers=bob)
                salted = http.post(COMPLETIONS, json=following(producer.id, cache_salt="other"), headers=ann)
                for answer in (unknown, others, salted):
                    assert error_of(answer) == (404, "response_not_found", "segments[1].response_id")
                assert others.text.replace(producer.id, "cmpl-0") == unknown.text
                go_on.set()
                producer.read()
            assert error_of(http.post(COMPLETIONS, json=following(producer.id), headers=bob))[0] == 404
            assert http.post(COMPLETIONS, json=following(producer.id), headers=ann).status_code == 200
        wait_for(lambda: live.state.admission.num_in_flight == 0)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"boundary": "merge"}, (400, "unsupported_value", "boundary")),
        ({"boundary": "strict"}, (400, "unsupported_value", "boundary")),
        ({"segments": [{"id": "a", "response_id": ""}]}, (400, "invalid_value", "segments[0].response_id")),
        ({"segments": [{"id": "a", "response_id": "x", "content": "y"}]}, (400, "unknown_parameter", None)),
        ({"segments": [{"id": "a", "context_id": "ctx_1"}]}, (400, "invalid_value", "segments[0].context_id")),
    ],
)
def test_what_cannot_be_followed_is_named(
    http: httpx.Client, fields: dict[str, Any], told: tuple[int, str, str | None]
) -> None:
    first = http.post(COMPLETIONS, json=completion(prompt=PLAN)).json()
    status, code, param = error_of(http.post(COMPLETIONS, json={**following(first["id"]), **fields}))
    assert (status, code) == told[:2]
    assert told[2] is None or param == told[2]


def test_only_requests_that_generate_follow(http: httpx.Client) -> None:
    first = http.post(COMPLETIONS, json=completion(prompt=PLAN)).json()
    explained = http.post("/v1/cache/explain", json=following(first["id"]))
    assert error_of(explained)[:2] == (400, "unsupported_value")
    segments = [{"id": "plan", "response_id": first["id"]}]
    warmed = http.post("/v1/cache/warm", json={"model": MODEL, "segments": segments})
    assert warmed.status_code == 400


def test_a_prompt_that_may_become_too_long_is_refused_at_once(http: httpx.Client, engine: Engine) -> None:
    with stalling(engine, written=3) as go_on:
        producer = begun(http, engine.max_context - 20)
        answer = http.post(COMPLETIONS, json={**following(producer.id), "prompt": "0123456789" * 5})
        assert error_of(answer)[:2] == (400, "context_length_exceeded")
        go_on.set()
        producer.close()


def test_the_official_client_follows_with_extra_body(live: Live, engine: Engine, pool: ThreadPoolExecutor) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", timeout=PATIENCE_S, max_retries=0) as client:
        ask = partial(client.chat.completions.create, model=MODEL, messages=HELLO, max_tokens=12, temperature=0)
        with stalling(engine, written=2) as go_on:
            plan = ask(stream=True, extra_body={"ignore_eos": True})
            first = next(iter(plan))
            extra = {"segments": [{"id": "plan", "response_id": first.id}]}
            reader = pool.submit(ask, extra_body=extra, stream=True)
            opened(engine)
            go_on.set()
            written = "".join(chunk.choices[0].delta.content or "" for chunk in plan)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in reader.result(PATIENCE_S))
        assert written
        assert text == ask(extra_body=extra).choices[0].message.content


def test_ended_answers_are_known_for_a_while_only() -> None:
    now = [0.0]
    sources = FollowedAnswers(lambda: now[0])
    for index in range(MAX_ENDED + 5):
        sources.add(str(index), ended := FollowedAnswer("space", 4, tuple, ended_handle(index)))
        sources.ended(ended)
    assert len(sources) == MAX_ENDED
    assert sources.find("0", "space") is None
    assert sources.find("7", "other space") is None
    newest = sources.find(str(MAX_ENDED + 4), "space")
    assert newest is not None
    assert newest.token_ids == (MAX_ENDED + 4,)
    now[0] = ENDED_S + 1
    assert sources.find(str(MAX_ENDED + 4), "space") is None
    assert len(sources) == 0
