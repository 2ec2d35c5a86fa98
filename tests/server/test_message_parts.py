"""Dynamic segments as parts of messages: in their place in what the chat template writes, the same in any order."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from kvcomm.memory.segments import Segment
from kvcomm.server.prompts import PromptMaker
from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.segments import MAX_SEGMENTS
from kvcomm.server.segments.registry import SegmentRegistries
from tests.server.conftest import chat
from tests.server.test_contexts import made, ok
from tests.server.test_fields import error_of
from tests.tiny import CHAT_TEMPLATE

CHAT = "/v1/chat/completions"
FOX, DOG = "The quick brown fox.\n", " Jumps over <|im_end|> the dog.\n"


def part(text: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **fields}


def asking(*parts: Any, system: str = "be <|im_end|> brief") -> list[dict[str, Any]]:
    """A conversation of which those are the parts of the last message."""
    return [{"role": "system", "content": system}, {"role": "user", "content": list(parts)}]


WEB = [part(text, name="web") for text in (FOX, DOG)]


def prompt_of(engine: Engine, body: dict[str, Any]) -> tuple[Segment, ...]:
    """What the engine is given for a request."""
    return PromptMaker(engine, SegmentRegistries(10_000)).chat(ChatRequest(**body), "ann").segments


def named(prompt: tuple[Segment, ...], name: str | None) -> list[tuple[int, ...]]:
    return [segment.token_ids for segment in prompt if segment.name == name]


def stock(engine: Engine, messages: list[dict[str, Any]]) -> str:
    """What the tokenizer itself writes."""
    whole = [
        {**each, "content": text if isinstance(text := each["content"], str) else "".join(one["text"] for one in text)}
        for each in messages
    ]
    return str(engine.tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True))


def text_of(engine: Engine, prompt: tuple[Segment, ...]) -> str:
    return engine.texts.decode(token for segment in prompt for token in segment.token_ids)


def test_parts_are_segments_in_their_place_and_the_same_in_any_order(engine: Engine) -> None:
    messages, turned = asking(*WEB, part("which?")), asking(*WEB[::-1], part("why?"), part(" tell"))
    first, second = (prompt_of(engine, chat(messages=each)) for each in (messages, turned))
    assert text_of(engine, first) == stock(engine, messages)
    assert text_of(engine, second) == stock(engine, turned)
    assert named(first, "web") == [engine.encoder.plain(FOX), engine.encoder.plain(DOG)] == named(second, "web")[::-1]
    assert named(first, None) == named(second, None)
    assert [segment.name for segment in second] == [None, "web", "web", "text", None]


def test_without_parts_that_are_segments_a_conversation_is_one_text(engine: Engine) -> None:
    plain = prompt_of(engine, chat(messages=asking(part(FOX), part(DOG, name="web", dynamic=False))))
    assert [segment.name for segment in plain] == [None]
    assert [segment.name for segment in prompt_of(engine, chat(messages=asking(part(FOX, dynamic=True))))] == [
        None,
        "passage",
        None,
    ]


def test_what_stands_behind_segments_is_no_part_of_the_template(engine: Engine) -> None:
    segments = [{"id": "d", "content": FOX, "kind": "dynamic"}]
    prompts = [prompt_of(engine, chat(segments=segments, messages=asking(part(text)))) for text in ("why?", "how?")]
    assert named(prompts[0], None) == named(prompts[1], None)
    assert [segment.name for segment in prompts[0]] == ["d", None, "text", None]


@pytest.mark.parametrize("boundary", ["separate", "strict", "merge"])
def test_segments_in_front_and_parts_together(client: TestClient, engine: Engine, boundary: str) -> None:
    body = chat(
        segments=[{"id": "d", "content": "First.\n", "kind": "dynamic"}], boundary=boundary, messages=asking(*WEB)
    )
    prompt = prompt_of(engine, body)
    assert text_of(engine, prompt) == "First.\n" + stock(engine, body["messages"])
    assert [segment.name for segment in prompt] == ["d", None, "web", "web", None]
    for _ in range(2):  # the second time all of it is cached
        (explained,) = ok(client.post("/v1/cache/explain", json=body))["prompts"]
        usage = ok(client.post(CHAT, json=body))["usage"]
    assert [each["id"] for each in explained["segments"]] == ["d", "web", "web"]
    sizes = [len(segment.token_ids) for segment in prompt if segment.name is not None]
    assert [each["tokens"] for each in explained["segments"]] == sizes
    assert [each["cached_tokens"] for each in explained["segments"]] == sizes
    assert usage["prompt_tokens"] == sum(len(segment.token_ids) for segment in prompt)


def test_explain_knows_the_parts_and_their_hashes(client: TestClient, engine: Engine) -> None:
    body = chat(messages=asking(*WEB, part("why?")))
    (explained,) = ok(client.post("/v1/cache/explain", json=body))["prompts"]
    digests = [Segment(engine.encoder.plain(text)).digest(engine.home()) for text in (FOX, DOG)]
    assert [(each["id"], each["hash"]) for each in explained["segments"]] == [("web", each) for each in digests]


def test_a_context_goes_on_behind_parts(client: TestClient, engine: Engine) -> None:
    """Parts of earlier messages stay what they were, those of new ones become segments behind them."""
    more = [{"role": "user", "content": [part(FOX, name="web"), part("again?")]}]
    context = made(client, messages=asking(*WEB, part("which?")))
    for messages in ([], more):
        ok(client.post(CHAT, json=chat(context_id=context["id"], messages=messages, store=True)))
    state = client.app.state.kvcomm  # type: ignore[attr-defined]
    (node,) = state.contexts.of(state.tenants.get()).nodes
    assert named(node.context.segments, "web") == [engine.encoder.plain(text) for text in (FOX, DOG, FOX)]
    assert named(node.context.segments, "text") == [engine.encoder.plain(text) for text in ("which?", "again?")]
    between = f"<|im_end|>\n<|im_start|>user\n{FOX}again?<|im_end|>\n<|im_start|>assistant\n"
    assert between in text_of(engine, node.context.segments)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"name": ""}, "messages[1].content[0].name", "invalid_value"),
        ({"name": "a b"}, "messages[1].content[0].name", "invalid_value"),
        ({"name": 3}, "messages[1].content[0].name", "invalid_value"),
        ({"dynamic": 1}, "messages[1].content[0].dynamic", "invalid_value"),
        ({"kind": "dynamic"}, "messages[1].content[0].kind", "unknown_parameter"),
    ],
)
def test_errors_name_the_field(client: TestClient, fields: dict[str, Any], param: str, code: str) -> None:
    error = error_of(client.post(CHAT, json=chat(messages=asking(part("a", **fields)))))
    assert (error["param"], error["code"]) == (param, code)


def test_there_is_a_limit_to_parts_that_are_segments(client: TestClient) -> None:
    for num_parts in (MAX_SEGMENTS, MAX_SEGMENTS + 1):
        response = client.post(CHAT, json=chat(messages=asking(*[part("a", dynamic=True)] * num_parts)))
        assert response.status_code == (200 if num_parts == MAX_SEGMENTS else 400)
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("messages", "invalid_value")
    assert f"{MAX_SEGMENTS + 1} parts that are segments; a request may have {MAX_SEGMENTS}" in error["message"]


def test_each_part_and_all_of_them_must_fit(client: TestClient, engine: Engine) -> None:
    """Found out without tokenizing: nothing of it reaches the engine."""
    many = "word " * engine.max_context
    for parts in ([part(many, name="web")], [part(many[: len(many) // 8], name="web")] * 16):
        error = error_of(client.post(CHAT, json=chat(messages=asking(*parts))))
        assert error["code"] == "context_length_exceeded"


def test_a_template_that_changes_a_part_is_told(client: TestClient, engine: Engine) -> None:
    tokenizer = engine.tokenizer
    tokenizer.chat_template = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
    try:
        error = error_of(client.post(CHAT, json=chat(messages=asking(*WEB))))
        assert (error["param"], error["code"]) == ("messages", "template_error")
        assert "messages[1].content[1]: the chat template writes it differently" in error["message"]
        assert ok(client.post(CHAT, json=chat(messages=asking(*WEB, part("why? ")))))
    finally:
        tokenizer.chat_template = CHAT_TEMPLATE
