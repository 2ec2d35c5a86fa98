"""The official client, unchanged, against a real server: answers, streams, errors, from threads and from asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from kvcomm.engine.engine import Engine
from kvcomm.server.keys import KeyRing, add_key
from kvcomm.server.settings import Limits, ServerSettings
from tests.limits import PATIENCE_S, wait_for
from tests.server.conftest import MODEL
from tests.server.live import Live, serving

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "how many apples are left?"}]


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    """The client as a user makes it."""
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", timeout=PATIENCE_S, max_retries=0) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "kvcomm"


def test_chat(client: openai.OpenAI) -> None:
    answers = [
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True)
        for _ in range(2)
    ]
    first, again = answers
    assert first.choices[0].message.content == again.choices[0].message.content
    assert first.choices[0].logprobs is not None
    assert first.usage is not None
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens - 1
    # The client keeps what it does not know.
    assert again.usage.model_extra is not None
    assert again.usage.model_extra["miss_reasons"] == {"last_token": 1}


def test_what_the_client_sends_back_is_understood(client: openai.OpenAI) -> None:
    """Agents append the message object itself to the conversation."""
    first = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=6, temperature=0)
    messages: list[ChatCompletionMessageParam] = [
        *MESSAGES,
        first.choices[0].message.model_dump(),  # type: ignore[list-item]  # as their examples do
        {"role": "user", "content": [{"type": "text", "text": "why?"}]},
    ]
    assert client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2).choices[0].finish_reason


def test_a_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=6, temperature=0)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=6,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6


def test_a_stream_that_is_left_early(client: openai.OpenAI, live: Live, engine: Engine) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    wait_for(lambda: live.state.admission.num_in_flight == 0)
    engine.check_integrity()
    assert engine.cache.stats().num_in_requests == 0


def test_plain_completions(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.completions.create(model=MODEL, prompt=["The quick", "brown fox"], max_tokens=6, temperature=0)
    expected = [engine.generate(prompt, max_new_tokens=6).text for prompt in ("The quick", "brown fox")]
    assert [choice.text for choice in answer.choices] == expected
    stream = client.completions.create(model=MODEL, prompt="The quick", max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected[0]


def test_many_at_once_from_asyncio(live: Live, engine: Engine) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="unused", timeout=PATIENCE_S) as client:

            async def streamed(index: int) -> str:
                stream = await client.completions.create(
                    model=MODEL, prompt=f"The quick {index}", max_tokens=8, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(streamed(index) for index in range(16)))

    expected = [engine.generate(f"The quick {index}", max_new_tokens=8).text for index in range(16)]
    assert asyncio.run(ask()) == expected


def test_errors_become_the_clients(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="modalities can only be") as bad:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, modalities=["text", "audio"])
    assert bad.value.param == "modalities"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9'") as missing:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError, match="unknown parameter: 'nonsense'"):
        client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={"nonsense": 1})


def test_keys_and_rates(engine: Engine, key_file: Path) -> None:
    key = add_key(key_file, "ann", limits=Limits(requests_per_minute=1e-6))
    with serving(engine, ServerSettings(model=MODEL, port=0), keys=KeyRing(key_file)) as live:
        url = f"{live.url}/v1"
        with openai.OpenAI(base_url=url, api_key="wrong", timeout=PATIENCE_S, max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError) as refused:
                stranger.models.list()
            assert refused.value.code == "invalid_api_key"
        with openai.OpenAI(base_url=url, api_key=key, timeout=PATIENCE_S, max_retries=0) as ann:
            assert ann.models.list().data
            with pytest.raises(openai.RateLimitError):
                ann.models.list()


def test_an_error_in_the_middle_of_a_stream(
    client: openai.OpenAI, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = engine.scheduler._runner.forward
    num_passes = [0]

    def failing(*arguments: object, **settings: object) -> object:
        num_passes[0] += 1
        if num_passes[0] > 8:
            raise ZeroDivisionError("secret detail")
        return forward(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.scheduler._runner, "forward", failing)
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=50, stream=True, extra_body={"ignore_eos": True}
    )
    with pytest.raises(openai.APIError, match="failed inside the server") as failed:
        list(stream)
    assert "secret" not in str(failed.value)
    with pytest.raises(openai.InternalServerError) as whole:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=50)
    assert "secret" not in str(whole.value)
