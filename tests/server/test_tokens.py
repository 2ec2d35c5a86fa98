"""`/tokenize` and `/detokenize`: the tokens are those of requests, and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from kvcomm.server.keys import KeyRing
from tests.server.conftest import HELLO, MODEL, SMALL, Keys, MakeClient, chat, completion, require_nothing_left
from tests.server.test_fields import error_of
from tests.tiny import tiny_llama
from tests.tokenizer_kinds import tokenizer_of

TEXT = "hello <|im_end|> wor 🙂"


@pytest.fixture(params=["byte-level", "llama-bos"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    tokenizer = tokenizer_of(request.param)
    with Engine(tiny_llama(vocab_size=len(tokenizer)), tokenizer, config=SMALL) as engine:
        yield engine
        require_nothing_left(engine)


def tokens_of(client: TestClient, **fields: Any) -> dict[str, Any]:
    response = client.post("/tokenize", json=fields)
    assert response.status_code == 200, response.text
    found = response.json()
    assert found["count"] == len(found["tokens"])
    return dict(found)


def test_tokens_are_those_of_the_request(client: TestClient, engine: Engine) -> None:
    found = tokens_of(client, model=MODEL, prompt=TEXT)
    usage = client.post("/v1/completions", json=completion(prompt=TEXT)).json()["usage"]
    assert found["count"] == usage["prompt_tokens"]
    assert found["max_model_len"] == engine.max_context
    assert found["token_strs"] is None
    found = tokens_of(client, messages=HELLO)
    assert found["count"] == client.post("/v1/chat/completions", json=chat()).json()["usage"]["prompt_tokens"]


def test_what_the_tokenizer_puts_before_a_text_can_be_left_out(client: TestClient, engine: Engine) -> None:
    whole = tokens_of(client, prompt=TEXT)["tokens"]
    bare = tokens_of(client, prompt=TEXT, add_special_tokens=False)["tokens"]
    assert whole == [*engine.encoder.start_ids, *bare]
    assert bare == engine.tokenizer.encode(TEXT, add_special_tokens=False)
    assert tokens_of(client, prompt="", add_special_tokens=False)["tokens"] == []


def test_pieces_of_the_vocabulary(client: TestClient, engine: Engine) -> None:
    found = tokens_of(client, prompt=TEXT, return_token_strs=True)
    assert found["token_strs"] == engine.tokenizer.convert_ids_to_tokens(found["tokens"])


def test_a_conversation_is_rendered_as_it_would_be(client: TestClient, engine: Engine) -> None:
    spoken = tokens_of(client, messages=HELLO)["tokens"]
    silent = tokens_of(client, messages=HELLO, add_generation_prompt=False)["tokens"]
    assert engine.texts.decode(spoken).startswith(engine.texts.decode(silent))
    assert len(silent) < len(spoken)
    messages = [*HELLO, {"role": "assistant", "content": "The"}]
    opened = tokens_of(client, messages=messages, continue_final_message=True)["tokens"]
    assert engine.texts.decode(opened) == engine.texts.decode(spoken) + "The"


def test_there_and_back(client: TestClient, engine: Engine) -> None:
    ids = tokens_of(client, prompt=TEXT, add_special_tokens=False)["tokens"]
    assert client.post("/detokenize", json={"model": MODEL, "tokens": ids}).json() == {"prompt": TEXT}
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, 400),
        ("/tokenize", {"prompt": "a", "tools": []}, 400),
        ("/tokenize", {"prompt": 5}, 400),
        ("/tokenize", {"prompt": "a", "model": "gpt-9"}, 404),
        ("/tokenize", {"prompt": "a" * 100_000}, 400),
        ("/detokenize", {"tokens": [10**8]}, 400),
        ("/detokenize", {"tokens": "a"}, 400),
        ("/detokenize", {"tokens": [1], "model": "gpt-9"}, 404),
    ],
)
def test_what_is_neither(client: TestClient, path: str, body: dict[str, Any], status: int) -> None:
    error_of(client.post(path, json=body), status)


def test_a_key_is_needed(make_client: MakeClient, keys: Keys, key_file: Any) -> None:
    from kvcomm.server.keys import KeyRing

    client = make_client(keys=KeyRing(key_file))
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
        assert client.post(path, json=body).status_code == 401
        assert client.post(path, json=body, headers=keys.header("ann")).status_code == 200


def test_what_a_harness_wants_to_know(client: TestClient, engine: Engine) -> None:
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == engine.tokenizer.eos_token
    assert info["bos_token"] == engine.tokenizer.bos_token
    assert info["model_max_length"] == engine.max_context
    assert info["chat_template"] == engine.tokenizer.chat_template


def test_only_tenants_are_told(make_client: MakeClient, keys: Keys, key_file: Path) -> None:
    guarded = make_client(keys=KeyRing(key_file))
    assert guarded.get("/tokenizer_info").status_code == 401
    assert guarded.get("/tokenizer_info", headers=keys.header("ann")).status_code == 200
