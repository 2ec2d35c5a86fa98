"""Log-probabilities of answers over HTTP: lists that add up to the text, whole and streamed; names of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from tests.scripted import draw
from tests.server.conftest import SMALL, chat, completion, require_nothing_left
from tests.server.events import events_of
from tests.tiny import tiny_llama
from tests.tokenizer_kinds import tokenizer_of

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LETTERS = "ab \nhé漢🙂👩‍🚀."
NUM_PADDING = 40
"""Ids of the model that the tokenizer does not know, as many models have them."""


@pytest.fixture(params=["byte-level", "llama"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    tokenizer = tokenizer_of(request.param)
    model = tiny_llama(vocab_size=len(tokenizer) + NUM_PADDING)
    with Engine(model, tokenizer, config=SMALL) as engine:
        yield engine
        require_nothing_left(engine)


def streamed(client: TestClient, body: dict[str, Any]) -> tuple[str, dict[str, list[Any]]]:
    """Text and lists of a completion that comes in pieces."""
    text, lists = "", dict[str, list[Any]]()
    for event in events_of(client.post(COMPLETIONS, json={**body, "stream": True}).text)[:-1]:
        (choice,) = event["choices"]
        text += choice["text"]
        for name, values in (choice["logprobs"] or {}).items():
            if values is not None:
                lists[name] = lists.get(name, []) + values
    return text, lists


def places_by_bytes(parts: list[bytes], text: str) -> list[int]:
    """Where tokens begin, from their bytes alone: behind the letters that were complete before."""
    whole = b"".join(parts)
    num_lost = len(whole.decode()) - len(text)
    befores = [b"".join(parts[:at]).decode("utf-8", "ignore") for at in range(len(parts))]
    return [max(0, len(before) - num_lost) for before in befores]


@settings(
    deadline=None,
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(text=st.text(st.sampled_from(LETTERS), min_size=1, max_size=8), with_stop=st.booleans(), data=st.data())
def test_answers_and_their_lists_are_one(
    client: TestClient, engine: Engine, text: str, with_stop: bool, data: st.DataObject
) -> None:
    ids = list(engine.encoder.plain(text))
    stop = data.draw(st.sampled_from(sorted(set(text)))) if with_stop else None
    with pytest.MonkeyPatch.context() as patch:
        draw(patch, ids)
        body = completion(max_tokens=len(ids), logprobs=0, ignore_eos=True, stop=stop)
        (choice,) = client.post(COMPLETIONS, json=body).json()["choices"]
        told = {name: values for name, values in choice["logprobs"].items() if values is not None}
        shown, lists = streamed(client, body)
        assert shown == choice["text"]
        assert lists.get("token_logprobs", []) == pytest.approx(told["token_logprobs"], abs=1e-4)
        assert [lists.get(name, []) for name in ("tokens", "text_offset")] == [told["tokens"], told["text_offset"]]
        (answer,) = client.post(CHAT, json=chat(max_tokens=len(ids), logprobs=True, ignore_eos=True, stop=stop)).json()[
            "choices"
        ]
    assert shown == answer["message"]["content"] == engine.tokenizer.decode(ids).split(stop or "\0")[0]
    parts = [bytes(token["bytes"]) for token in answer["logprobs"]["content"]]
    num = len(told["tokens"])
    assert len(parts) == num
    whole = b"".join(engine.texts.token_bytes(token_id) for token_id in ids)
    assert whole.startswith(b"".join(parts))
    # Every token that begins before the end of the text is there, and no other that has a text.
    places = places_by_bytes([engine.texts.token_bytes(token_id) for token_id in ids], engine.tokenizer.decode(ids))
    inside = [place for place in places if place < len(shown)]
    assert told["text_offset"][: len(inside)] == inside
    assert b"".join(parts[len(inside) :]).strip() == b""  # a space that the start of the text has lost
    if stop is None:
        assert b"".join(parts).decode() in (shown, " " + shown)  # which the start of a text may lose


def test_no_two_alternatives_have_one_name(client: TestClient) -> None:
    """Parts of characters were all called alike, and so were ids that the tokenizer does not know."""
    body = completion(logprobs=20, temperature=0, max_tokens=8, ignore_eos=True)
    (choice,) = client.post(COMPLETIONS, json=body).json()["choices"]
    for token, logprob, top in zip(
        *(choice["logprobs"][name] for name in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert len(top) == 20
        assert top[token] == logprob == max(top.values())


def test_a_token_that_is_no_alternative_is_among_them(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(monkeypatch, engine.encoder.plain("h"))
    (choice,) = client.post(COMPLETIONS, json=completion(logprobs=1, max_tokens=4)).json()["choices"]
    told = choice["logprobs"]
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert top[token] == logprob
        assert len(top) == (1 if logprob == max(top.values()) else 2)


def test_a_token_that_a_stop_string_cut_is_told(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had put text into the answer, and there was no entry for it."""
    texts = {token: engine.texts.token_text(token) for token in range(3, len(engine.tokenizer))}
    cut = next(token for token, text in texts.items() if len(text) > 1 and text.isascii() and "<" not in text)
    draw(monkeypatch, [cut])
    body = completion(max_tokens=3, logprobs=1, stop=texts[cut][-1])
    (choice,) = client.post(COMPLETIONS, json=body).json()["choices"]
    assert choice["text"].strip() == texts[cut][:-1].strip()
    assert choice["logprobs"]["tokens"] == [texts[cut]]
    assert choice["logprobs"]["text_offset"] == [0]
    assert streamed(client, body)[1]["tokens"] == [texts[cut]]
