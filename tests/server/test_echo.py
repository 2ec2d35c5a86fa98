"""Prompts in answers: echo, their log-probabilities, and what lm-evaluation-harness reads from both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from tests.scripted import draw
from tests.server.conftest import HELLO, SMALL, chat, completion, require_nothing_left
from tests.server.events import DONE, events_of
from tests.server.test_fields import error_of
from tests.tiny import tiny_llama
from tests.tokenizer_kinds import tokenizer_of

URL = "/v1/completions"
PROMPTS = ([5, 17, 40, 8, 120, 33], [7, 7, 7], [200, 45, 61, 90, 3])
"""Ids of three prompts; the first `CONTEXTS[i]` of each are its context."""
CONTEXTS = (4, 1, 3)


def choices_of(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    return sorted(response.json()["choices"], key=lambda choice: choice["index"])


def stock_logprobs(engine: Engine, ids: list[int]) -> torch.Tensor:
    """[tokens, vocabulary]: what the model alone says behind each token."""
    with torch.inference_mode():
        return engine.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("ends", [False, True], ids=["goes on", "ends at once"])
def test_a_harness_scores_continuations(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """It leaves out the last entry, which is the drawn token's, also where that ends the answer and is not in it."""
    if ends:
        end = engine.tokenizer.eos_token_id
        assert isinstance(end, int)
        draw(monkeypatch, [end])
    body = completion(prompt=list(PROMPTS), echo=True, logprobs=1, max_tokens=1, seed=1234)
    for choice, ids, num_context in zip(choices_of(client.post(URL, json=body)), PROMPTS, CONTEXTS, strict=True):
        told = choice["logprobs"]
        assert {len(values) for values in told.values()} == {len(ids) + 1}
        assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
        expected = stock_logprobs(engine, ids)
        wanted = [float(expected[at - 1, ids[at]]) for at in range(num_context, len(ids))]
        assert told["token_logprobs"][num_context:-1] == pytest.approx(wanted, abs=1e-4)
        greedy = [
            logprob == max(top.values())
            for logprob, top in zip(told["token_logprobs"], told["top_logprobs"], strict=True)
            if top is not None
        ]
        best = expected[:-1].argmax(-1).tolist()
        assert greedy[:-1] == [best[at - 1] == ids[at] for at in range(1, len(ids))]
        assert choice["text"].startswith(engine.texts.decode(ids))
        assert told["text_offset"][-1] == len(engine.texts.decode(ids))


@pytest.mark.parametrize("is_streamed", [False, True])
def test_only_the_prompt_is_read(client: TestClient, engine: Engine, is_streamed: bool) -> None:
    body = completion(prompt=[PROMPTS[0]], echo=True, logprobs=2, max_tokens=0, stream=is_streamed)
    response = client.post(URL, json=body)
    (choice,) = events_of(response.text)[0]["choices"] if is_streamed else choices_of(response)
    assert choice["text"] == engine.texts.decode(PROMPTS[0])
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == len(PROMPTS[0])
    if not is_streamed:
        assert response.json()["usage"]["completion_tokens"] == 0


def test_nothing_is_generated_also_without_an_echo(client: TestClient) -> None:
    (choice,) = choices_of(client.post(URL, json=completion(max_tokens=0)))
    assert (choice["text"], choice["finish_reason"]) == ("", "length")
    *chunks, done = events_of(client.post(URL, json=completion(max_tokens=0, n=2, stream=True)).text)
    assert done == DONE
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == ["length"] * 2


def test_a_prompt_as_long_as_the_model_takes_can_be_read(client: TestClient, engine: Engine) -> None:
    prompt = [5] * engine.max_context
    (choice,) = choices_of(client.post(URL, json=completion(prompt=prompt, echo=True, logprobs=0, max_tokens=0)))
    assert len(choice["logprobs"]["tokens"]) == engine.max_context
    error = error_of(client.post(URL, json=completion(prompt=prompt, max_tokens=1)))
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("logprobs", [None, 0, 3])
def test_streamed_echoes_are_whole_ones(client: TestClient, logprobs: int | None) -> None:
    body = completion(prompt=["The quick 🙂", "brown"], echo=True, logprobs=logprobs, n=2, max_tokens=4)
    whole = {choice["index"]: choice for choice in choices_of(client.post(URL, json=body))}
    texts = dict.fromkeys(whole, "")
    lists: dict[int, dict[str, list[Any]]] = {index: {} for index in whole}
    for event in events_of(client.post(URL, json={**body, "stream": True}).text)[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        for name, values in (choice["logprobs"] or {}).items():
            lists[choice["index"]][name] = lists[choice["index"]].get(name, []) + (values or [])
    for index, choice in whole.items():
        assert texts[index] == choice["text"]
        for name in ("tokens", "text_offset"):
            assert lists[index].get(name) == (choice["logprobs"] or {}).get(name)
        if logprobs is not None:
            told, expected = (each["token_logprobs"][1:] for each in (lists[index], choice["logprobs"]))
            assert told == pytest.approx(expected, abs=1e-4)
        assert choice["text"].startswith(body["prompt"][index // 2])


def test_offsets_of_a_prompt_and_its_answer_count_characters_of_the_text(client: TestClient) -> None:
    body = completion(prompt="a 🙂 quick fox", echo=True, logprobs=0, max_tokens=5, ignore_eos=True)
    (choice,) = choices_of(client.post(URL, json=body))
    told = choice["logprobs"]
    assert told["text_offset"] == sorted(told["text_offset"])
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        if not token.startswith(("bytes:", "token_id:")):
            assert choice["text"].startswith(token, offset)
    parts = [offset for token, offset in zip(told["tokens"], told["text_offset"], strict=True) if "bytes:" in token]
    assert parts[:4] == [2] * 4


def test_prompt_log_probabilities_by_token_id(client: TestClient, engine: Engine) -> None:
    ids = PROMPTS[0]
    (choice,) = choices_of(client.post(URL, json=completion(prompt=ids, prompt_logprobs=2)))
    first, *told = choice["prompt_logprobs"]
    assert first is None
    expected = stock_logprobs(engine, ids)
    for at, places in enumerate(told, 1):
        assert 2 <= len(places) <= 3
        here = places[str(ids[at])]
        assert here["logprob"] == pytest.approx(float(expected[at - 1, ids[at]]), abs=1e-4)
        assert here["decoded_token"] == engine.texts.token_text(ids[at])
        assert [each["rank"] for each in places.values() if each["rank"] is not None].count(1) == 1
    assert choice["logprobs"] is None
    answer = client.post("/v1/chat/completions", json=chat(prompt_logprobs=0)).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


def test_echo_and_prompt_log_probabilities_together(client: TestClient) -> None:
    body = completion(prompt=PROMPTS[0], echo=True, logprobs=1, prompt_logprobs=4)
    (choice,) = choices_of(client.post(URL, json=body))
    assert all(len(top) <= 2 for top in choice["logprobs"]["top_logprobs"][1:])
    assert all(4 <= len(places) <= 5 for places in choice["prompt_logprobs"][1:])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"echo": True, "segments": [{"id": "a", "content": "b"}]}, "echo"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"echo": "yes"}, "echo"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_what_cannot_be_told_is_refused(client: TestClient, fields: dict[str, Any], param: str) -> None:
    assert error_of(client.post(URL, json=completion(**fields)))["param"] == param


def test_nothing_is_told_of_what_a_context_holds(client: TestClient) -> None:
    context = client.post("/v1/contexts", json={"messages": HELLO}).json()["id"]
    for fields in ({"echo": True}, {"prompt_logprobs": 1}):
        error = error_of(client.post(URL, json=completion(context_id=context, **fields)))
        assert error["param"] in fields


class TestPiecesWithSpaces:
    """A tokenizer that puts a space before words, which the text of an answer loses."""

    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        tokenizer = tokenizer_of("llama-bos")
        with Engine(tiny_llama(vocab_size=len(tokenizer)), tokenizer, config=SMALL) as engine:
            yield engine
            require_nothing_left(engine)

    @pytest.mark.parametrize("is_streamed", [False, True])
    @pytest.mark.parametrize("logprobs", [None, 1])
    def test_an_echo_reads_as_prompt_and_answer_do(
        self,
        client: TestClient,
        engine: Engine,
        monkeypatch: pytest.MonkeyPatch,
        logprobs: int | None,
        is_streamed: bool,
    ) -> None:
        draw(monkeypatch, engine.tokenizer.convert_tokens_to_ids(["▁w", "<0xC3>", "<0xA9>", "or"]))
        body = completion(prompt="hello wor", echo=True, max_tokens=4, logprobs=logprobs, stream=is_streamed)
        response = client.post(URL, json=body)
        choices = (
            [event["choices"][0] for event in events_of(response.text)[:-1]] if is_streamed else choices_of(response)
        )
        assert "".join(choice["text"] for choice in choices) == "hello wor wéor"
        if logprobs is None:
            return
        told = choices[0]["logprobs"]
        assert told["tokens"][-4:] == [" w", "bytes:\\xc3", "bytes:\\xa9", "or"]
        assert told["text_offset"][-4:] == [9, 11, 11, 12]
        assert told["text_offset"][:2] == [0, 0]  # the start token, which nobody wrote
