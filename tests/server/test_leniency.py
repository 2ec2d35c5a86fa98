"""What clients send back and what other servers take: served or ignored; refused only where meaning is lost."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from starlette.testclient import TestClient
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from kvcomm.engine.chat_template import RESERVED
from kvcomm.engine.engine import Engine
from tests.scripted import draw
from tests.server.conftest import HELLO, chat, completion
from tests.server.events import events_of
from tests.server.test_chat import prompt_of
from tests.server.test_fields import error_of
from tests.server.test_message_parts import part

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SEEN = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for name in ('reasoning_content', 'reasoning', 'name', 'mood', 'id') %}"
    "{% if m[name] %}({{ name }}={{ m[name] }}){% endif %}{% endfor %};{% endfor %}"
    "{% if enable_thinking is defined %}[{{ enable_thinking }}]{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""A template that shows what it is given."""

ANSWER = {
    "id": "msg_1",
    "role": "assistant",
    "content": "three",
    "reasoning_content": "hm",
    "refusal": None,
    "annotations": [],
    "audio": None,
    "function_call": None,
    "tool_calls": None,
    "provider_specific_fields": {"x": [1]},
}
"""An earlier answer as clients keep it."""


CALL = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}", "parsed": None}}
RESULT = {"role": "tool", "content": "x", "tool_call_id": "c", "name": "f", "status": "ok"}


@pytest.fixture
def seen(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine whose template shows what it is given."""
    monkeypatch.setattr(engine.tokenizer, "chat_template", SEEN)
    return engine


def shown(engine: Engine, **fields: Any) -> str:
    return engine.texts.decode(prompt_of(engine, chat(**fields)))


@pytest.mark.parametrize(
    "messages",
    [
        [*HELLO, ANSWER],
        [*HELLO, {**ANSWER, "content": [part("three", annotations=[], id="t1", index=0)]}],
        [{**HELLO[0], "id": "u", "timestamp": 5, "cache_control": {"type": "ephemeral"}}],
        [*HELLO, {"role": "assistant", "content": "x", "reasoning": "hm", "reasoning_details": [{"type": "text"}]}],
        [*HELLO, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT],
    ],
)
@pytest.mark.parametrize("tools", [None, [{"name": "f"}]])
def test_messages_as_clients_keep_them_are_taken(client: TestClient, messages: list[Any], tools: Any) -> None:
    given = [{"type": "function", "function": each, "cache_control": {"type": "ephemeral"}} for each in tools or ()]
    response = client.post(CHAT, json=chat(messages=messages, **({"tools": given} if given else {})))
    assert response.status_code == 200, response.text


def test_the_template_sees_what_was_thought_and_what_nobody_documents(seen: Engine) -> None:
    text = shown(seen, messages=[*HELLO, {**ANSWER, "mood": "<|im_end|>glad"}])
    assert text.endswith("assistant:three(reasoning_content=hm)(reasoning=hm)(mood=<|im_end|>glad);assistant:")
    ids = prompt_of(seen, chat(messages=[{**HELLO[0], "mood": "<|im_end|>"}]))
    assert seen.tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids


def test_what_would_lose_meaning_is_still_refused(client: TestClient) -> None:
    for field, value in (("audio", {"id": "a"}), ("function_call", {"name": "f", "arguments": "{}"})):
        messages = [*HELLO, {**ANSWER, field: value}]
        assert error_of(client.post(CHAT, json=chat(messages=messages)))["param"] == f"messages[1].{field}"
    content = [part("a"), {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]
    error = error_of(client.post(CHAT, json=chat(messages=[{"role": "user", "content": content}])))
    assert error["param"] == "messages[0].content[1]"


@pytest.mark.parametrize(
    "fields",
    [
        {"store": True},
        {"store": True, "n": 2},
        {"top_k": -1},
        {"frequency_penalty": 0.5, "presence_penalty": -2},
        {"logit_bias": {"5": -100, "7": 3.5}},
        {"min_tokens": 3},
        {"min_tokens": 10_000},
        {"stop_token_ids": [5, 2**31 - 1]},
        {"skip_special_tokens": False},
        {"stop": [f"stop {at}" for at in range(64)]},
        {"prompt_logprobs": 0},
    ],
)
@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_what_other_servers_take_is_served(client: TestClient, url: str, fields: dict[str, Any]) -> None:
    body = chat(**fields) if url == CHAT else completion(**fields)
    response = client.post(url, json=body)
    assert response.status_code == 200, response.text
    assert client.post(url, json={**body, **dict.fromkeys(fields)}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_k": -2}, "top_k"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": "1"}, "presence_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"five": 1}}, "logit_bias.five"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
    ],
)
def test_values_out_of_range_are_named(client: TestClient, fields: dict[str, Any], param: str) -> None:
    assert error_of(client.post(CHAT, json=chat(**fields)))["param"] == param


def test_plain_completions_have_sixteen_tokens_unless_said(client: TestClient) -> None:
    for body in (completion(ignore_eos=True), completion(ignore_eos=True, max_tokens=None)):
        body = {name: value for name, value in body.items() if name != "max_tokens" or value is None}
        assert client.post(COMPLETIONS, json=body).json()["usage"]["completion_tokens"] == 16


def test_stop_tokens_end_an_answer(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = engine.encoder.plain("abc")
    draw(monkeypatch, ids)
    (choice,) = client.post(COMPLETIONS, json=completion(stop_token_ids=[ids[1]])).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("a", "stop")


def test_special_tokens_are_shown_on_request(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = engine.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert isinstance(start, int)
    draw(monkeypatch, [start, *engine.encoder.plain("a")])
    for skips, text in ((None, "a"), (True, "a"), (False, "<|im_start|>a")):
        body = chat(max_tokens=2, skip_special_tokens=skips)
        assert client.post(CHAT, json=body).json()["choices"][0]["message"]["content"] == text


def test_the_template_sees_variables(seen: Engine) -> None:
    assert shown(seen, chat_template_kwargs={"enable_thinking": False}).endswith(";[False]assistant:")
    text = shown(seen, chat_template_kwargs={"enable_thinking": {"deep": "<|im_start|>"}})
    assert text.endswith("[{'deep': '<|im_start|>'}]assistant:")


def test_variables_that_a_template_fails_on_are_refused(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its TypeError was a 500."""
    monkeypatch.setattr(engine.tokenizer, "chat_template", "{{ 1 + size }}")
    error = error_of(client.post(CHAT, json=chat(chat_template_kwargs={"size": "x"})))
    assert error["code"] == "template_error"


def test_no_variable_can_change_what_rendering_is_told() -> None:
    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    parameters = {**parameters, **inspect.signature(render_jinja_template).parameters}
    assert parameters.keys() - {"kwargs"} <= RESERVED


def test_a_prompt_may_end_without_an_answers_beginning(seen: Engine) -> None:
    assert shown(seen, add_generation_prompt=False) == f"user:{HELLO[0]['content']};"


@pytest.mark.parametrize("content", ["It is ", "\n", "<|im_end|> ", [part("It"), part(" is ")]])
def test_an_answer_goes_on_with_the_last_message(engine: Engine, content: Any) -> None:
    messages = [*HELLO, {"role": "assistant", "content": content}]
    text = shown(engine, messages=messages, continue_final_message=True)
    said = content if isinstance(content, str) else "It is "
    assert text == shown(engine) + said
    assert prompt_of(engine, chat(messages=messages, continue_final_message=True)).count(2) == 1  # of the question


def test_an_answer_behind_segments_goes_on(client: TestClient, engine: Engine) -> None:
    messages = [
        {"role": "user", "content": [part("The fox. ", name="web"), part("who?")]},
        {"role": "assistant", "content": "It is "},
    ]
    prompt = chat(messages=messages, continue_final_message=True)
    assert client.post(CHAT, json=prompt).status_code == 200


def test_a_template_that_drops_the_last_message_cannot_go_on_with_it(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", "{{ messages[0].content }}")
    messages = [*HELLO, {"role": "assistant", "content": "It"}]
    error = error_of(client.post(CHAT, json=chat(messages=messages, continue_final_message=True)))
    assert error["code"] == "template_error"


def test_a_context_has_its_own_place_for_answers(client: TestClient) -> None:
    context = client.post("/v1/contexts", json={"messages": HELLO}).json()["id"]
    for fields in ({"add_generation_prompt": False}, {"continue_final_message": True}):
        error = error_of(client.post(CHAT, json=chat(context_id=context, **fields)))
        assert error["param"] in fields
    body = chat(context_id=context, store=True, n=2)
    assert error_of(client.post(CHAT, json=body))["param"] == "n"


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_every_chunk_counts_the_tokens_so_far(client: TestClient, url: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    make = chat if url == CHAT else completion
    body = make(stream=True, ignore_eos=True, n=2, max_tokens=5, stream_options=options)
    *chunks, last, _ = events_of(client.post(url, json=body).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 10
    for usage in (chunk["usage"] for chunk in (*chunks, last)):
        assert usage["prompt_tokens"] == last["usage"]["prompt_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
