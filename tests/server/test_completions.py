"""`/v1/completions` in process: texts and ids as they are, several prompts in one request."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from tests.server.conftest import completion
from tests.server.events import DONE, events_of

URL = "/v1/completions"


@pytest.mark.parametrize("form", ["text", "ids", "texts", "batches"])
def test_forms_of_a_prompt(client: TestClient, engine: Engine, form: str) -> None:
    text = "The quick brown fox"
    ids = list(engine.segment(text).token_ids)
    prompt: Any = {"text": text, "ids": ids, "texts": [text], "batches": [ids]}[form]
    answer = client.post(URL, json=completion(prompt=prompt)).json()
    (choice,) = answer["choices"]
    assert choice["text"] == engine.generate(text, max_new_tokens=6).text
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_several_prompts_and_choices(client: TestClient, engine: Engine) -> None:
    prompts = ["The quick", "brown fox", "jumps over"]
    answer = client.post(URL, json=completion(prompt=prompts, n=2)).json()
    texts = [choice["text"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]
    expected = [engine.generate(prompt, max_new_tokens=6).text for prompt in prompts]
    assert texts == [text for text in expected for _ in range(2)]  # greedy: both choices alike
    assert answer["usage"]["prompt_tokens"] == sum(len(engine.segment(prompt).token_ids) for prompt in prompts)
    assert answer["usage"]["completion_tokens"] == 3 * 2 * 6


def test_streams_of_several_prompts(client: TestClient) -> None:
    body = completion(prompt=["The quick", "brown fox"], n=2, logprobs=1)
    whole = {choice["index"]: choice["text"] for choice in client.post(URL, json=body).json()["choices"]}
    streamed = dict.fromkeys(whole, "")
    tokens = dict.fromkeys(whole, 0)
    ends: list[int] = []
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = events_of(client.post(URL, json=body).text)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["text"]
        tokens[choice["index"]] += len((choice["logprobs"] or {"tokens": []})["tokens"])
        ends += [choice["index"]] * (choice["finish_reason"] is not None)
    assert (streamed, done) == (whole, DONE)
    assert sorted(ends) == sorted(whole)
    assert set(tokens.values()) == {6}
    assert usage["usage"]["completion_tokens"] == 4 * 6


def test_logprobs(client: TestClient) -> None:
    (choice,) = client.post(URL, json=completion(logprobs=2)).json()["choices"]
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {6}
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob == max(top.values())
    assert logprobs["text_offset"][0] == 0
    assert client.post(URL, json=completion(logprobs=0)).json()["choices"][0]["logprobs"]["top_logprobs"] is None


def test_control_tokens_in_a_plain_prompt_are_real(client: TestClient, engine: Engine) -> None:
    text = "<|im_start|>user\nhello<|im_end|>\n"
    usage = client.post(URL, json=completion(prompt=text)).json()["usage"]
    assert usage["prompt_tokens"] == len(engine.segment(text).token_ids)


def test_an_id_that_the_model_does_not_know(client: TestClient) -> None:
    response = client.post(URL, json=completion(prompt=[1, 10**9]))
    assert response.status_code == 400
    assert "1000000000" in response.json()["error"]["message"]
