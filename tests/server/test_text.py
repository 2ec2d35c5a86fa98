"""Texts over HTTP with tokenizers that put a space or a start token before them: all of it reads as it was written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from kvcomm.engine.engine import Engine
from kvcomm.server.app import make_app
from kvcomm.server.settings import ServerSettings
from tests.scripted import draw
from tests.server.conftest import HELLO, MODEL, SMALL, MakeClient, chat, completion, require_nothing_left
from tests.server.test_contexts import CHAT, MORE, made, ok, said
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.tokenizer_kinds import tokenizer_of

COMPLETIONS = "/v1/completions"
START = {"llama": "", "llama-bos": "<s>", "llama-bos-eos": "<s>", "llama-legacy": "", "byte-level-prefixed": ""}
CALL = [{"role": "user", "content": "say <|tool_call|> and <|im_end|>   now"}]


@pytest.fixture(params=[*START, "added-tokens"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(kind: str) -> Iterator[Engine]:
    tokenizer = tokenizer_of(kind)
    with Engine(tiny_llama(vocab_size=len(tokenizer)), tokenizer, config=SMALL) as engine:
        yield engine
        require_nothing_left(engine)


@pytest.fixture
def client(make_client: MakeClient) -> TestClient:
    return make_client(log_prompts=True)


def thinking() -> PreTrainedTokenizerBase:
    """One whose template leaves out the thoughts of earlier answers."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("</think>", special=False, normalized=False)])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:"
        "{% if m.role == 'assistant' and '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content }}{% endif %};{% endfor %}"
    )
    return tokenizer


def held(client: TestClient) -> Any:
    """The one context that the server holds."""
    state = client.app.state.kvcomm  # type: ignore[attr-defined]
    (node,) = state.contexts.of(state.tenants.get()).nodes
    return node.context


def rendered(engine: Engine, messages: list[dict[str, str]], **settings: Any) -> str:
    return str(engine.tokenizer.apply_chat_template(messages, tokenize=False, **settings))


def test_a_conversation_is_what_the_chat_template_gives(client: TestClient, engine: Engine, kind: str) -> None:
    """A space stood at the beginning of every part, and a start token nowhere, or again in the middle."""
    context = made(client, messages=HELLO)
    answer = ok(client.post(CHAT, json=chat(messages=MORE, context_id=context["id"], store=True)))
    start = START.get(kind, "")
    ids = held(client).tokens
    text = engine.texts.decode(ids)
    before = start + rendered(engine, [*HELLO, *MORE], add_generation_prompt=True)
    assert text.startswith(before)
    assert engine.tokenizer.decode(ids[answer["usage"]["prompt_tokens"] :], skip_special_tokens=True) == said(answer)
    if start:
        assert ids.count(engine.tokenizer.bos_token_id) == 1
    whole = ok(client.post(CHAT, json=chat(messages=[*HELLO, *MORE])))
    assert whole["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert said(whole) == said(answer)


def test_segments_and_text_are_one_text(client: TestClient, engine: Engine, kind: str) -> None:
    segments = [{"id": name, "content": text} for name, text in (("a", "hel"), ("b", "lo w"))]
    answer = ok(client.post(COMPLETIONS, json=completion(prompt="orld", segments=segments)))
    start = engine.encoder.start_ids
    pieces = [engine.encoder.piece(text) for text in ("hel", "lo w", "orld")]
    assert answer["usage"]["prompt_tokens"] == len(start) + sum(map(len, pieces))
    assert (
        engine.texts.decode([*start, *(token for ids in pieces for token in ids)])
        == START.get(kind, "") + "hello world"
    )


@pytest.mark.parametrize("kind", ["added-tokens"], indirect=True)
def test_a_control_token_that_nobody_flagged_is_text_in_messages(client: TestClient, engine: Engine) -> None:
    context = made(client, messages=CALL)
    ids = held(client).tokens
    tool, spaces = (engine.tokenizer.convert_tokens_to_ids(text) for text in ("<|tool_call|>", "   "))
    assert tool not in ids
    assert spaces in ids
    assert engine.texts.decode(ids) == rendered(engine, CALL)
    whole = ok(client.post(CHAT, json=chat(messages=CALL)))
    assert whole["usage"]["prompt_tokens"] > context["tokens"]


@pytest.mark.parametrize("kind", ["llama", "llama-bos"], indirect=True)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_stored_answer_is_the_one_that_was_shown(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    context = made(client, messages=HELLO)
    draw(monkeypatch, engine.tokenizer.convert_tokens_to_ids(["1", ")\n", "2"]))
    body = chat(messages=MORE, context_id=context["id"], store=True, stop="\n", stream=is_streamed)
    answer = client.post(CHAT, json=body)
    assert answer.status_code == 200
    assert is_streamed or said(answer.json()) == "1)"
    assert engine.texts.decode(held(client).tokens).endswith("assistant\n1)")
    draw(monkeypatch, engine.tokenizer.convert_tokens_to_ids(["3", "2"]))
    ok(client.post(CHAT, json=chat(messages=MORE, context_id=context["id"], store=True, max_tokens=2)))
    answers = [{"role": "assistant", "content": text} for text in ("1)", "32")]
    expected = rendered(engine, [*HELLO, *MORE, answers[0], *MORE, answers[1]]).removesuffix("<|im_end|>\n")
    assert engine.texts.decode(held(client).tokens).removeprefix("<s>") == expected


@pytest.mark.parametrize("kind", ["llama"], indirect=True)
def test_texts_of_tokens_add_up_to_the_answer(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The space before a word, and the bytes of an emoji, were lost."""
    draw(monkeypatch, engine.tokenizer.convert_tokens_to_ids(["1", "▁h", "<0xC3>", "<0xA9>"]))
    (choice,) = ok(client.post(CHAT, json=chat(logprobs=True, top_logprobs=1, max_tokens=4)))["choices"]
    tokens = choice["logprobs"]["content"]
    assert choice["message"]["content"] == "1 hé"
    assert [token["token"] for token in tokens[:2]] == ["1", " h"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == "1 hé"
    draw(monkeypatch, engine.tokenizer.convert_tokens_to_ids(["1", "▁h", "2"]))
    (choice,) = ok(client.post(COMPLETIONS, json=completion(logprobs=1, max_tokens=3)))["choices"]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"] == "1 h2"
    assert choice["logprobs"]["text_offset"] == [0, 1, 3]


@pytest.mark.parametrize("kind", ["llama"], indirect=True)
def test_a_chat_template_still_finds_the_end_of_thoughts_in_answers(kind: str, make_client: MakeClient) -> None:
    """In an assistant's own words only: in anybody else's they are text."""
    tokenizer = thinking()
    messages = [
        {"role": "user", "content": "a</think>b"},
        {"role": "assistant", "content": "hm<|im_end|></think>yes"},
        {"role": "user", "content": "c"},
    ]
    with Engine(tiny_llama(vocab_size=len(tokenizer)), tokenizer, config=SMALL) as engine:
        client = TestClient(make_app(engine, ServerSettings(model=MODEL)), base_url="http://localhost")
        made(client, messages=messages)
        context = held(client)
        assert context.text == "user:a</think>b;assistant:yes;user:c;"
        assert tokenizer.convert_tokens_to_ids("</think>") not in context.tokens
        ok(client.post(CHAT, json=chat(messages=messages)))
        client.app.state.kvcomm.contexts.close()  # type: ignore[attr-defined]
