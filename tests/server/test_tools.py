"""Tools through the server: shown to the model, called in answers whole and streamed, kept in histories, or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI
from starlette.testclient import TestClient

from kvcomm.engine.engine import Engine
from kvcomm.server.schemas.chat import ChatRequest
from tests.scripted import draw
from tests.server.conftest import HELLO, MakeClient, chat
from tests.server.events import DONE, events_of
from tests.server.test_fields import error_of
from tests.tiny import CHAT_TEMPLATE, TinyModel, tiny_model

CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln 🙂"}}\n</tool_call>'
CALLED = [
    *HELLO,
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}},
            {"id": "c2", "type": "function", "function": {"name": "now", "arguments": "{}"}},
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "It is sunny."},
    {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "Noon <|im_end|>."}]},
]
HERMES_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def shared_model() -> TinyModel:
    """With room for what is said about tools."""
    made = tiny_model()
    made.model.config.max_position_embeddings = 4096
    return made


def say(monkeypatch: pytest.MonkeyPatch, engine: Engine, text: str) -> None:
    """Let every answer be that text."""
    ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    draw(monkeypatch, [*ids, engine.tokenizer.eos_token_id])


def asked(client: TestClient, **fields: Any) -> dict[str, Any]:
    """The answer to a request with tools."""
    answer = client.post(CHAT, json=chat(**{"tools": [WEATHER, NOW], "max_tokens": 200, **fields}))
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def streamed(client: TestClient, **fields: Any) -> list[Any]:
    """The choices of the chunks of a streamed answer."""
    answer = client.post(CHAT, json=chat(**{"max_tokens": 300, "stream": True, **fields}))
    *chunks, end = events_of(answer.text)
    assert end == DONE
    return [chunk["choices"][0] for chunk in chunks]


def prompt_of(engine: Engine, client: TestClient, **fields: Any) -> str:
    """What the model is given."""
    state = client.app.state.kvcomm  # type: ignore[attr-defined]  # starlette's client knows its app
    prompt = state.prompts.chat(ChatRequest(**chat(**fields)), "ann")
    return engine.texts.decode(prompt.token_ids)


def test_a_call_is_a_call(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, engine, f"Let me see.\n{CALL}")
    answer = asked(client)
    (choice,) = answer["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "Let me see.")
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Köln 🙂"}
    assert answer["usage"]["tools"] == "default"


def test_a_streamed_call_is_the_whole_one(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, engine, f"Let me see.\n{CALL}\n{CALL}")
    whole = asked(client)["choices"][0]
    deltas = streamed(client, tools=[WEATHER])
    assert deltas[-1]["finish_reason"] == "tool_calls"
    assert "".join(each["delta"].get("content") or "" for each in deltas) == "Let me see."
    calls: dict[int, dict[str, str]] = {}
    for each in deltas:
        for delta in each["delta"].get("tool_calls", []):
            if "id" in delta:
                assert delta["index"] == len(calls)
                calls[delta["index"]] = {"id": delta["id"], "name": delta["function"]["name"], "arguments": ""}
            calls[delta["index"]]["arguments"] += delta["function"]["arguments"]
    wanted = [each["function"] for each in whole["message"]["tool_calls"]]
    assert [{"name": each["name"], "arguments": each["arguments"]} for each in calls.values()] == wanted
    assert len({each["id"] for each in calls.values()}) == 2


def test_the_official_client_reads_both(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, engine, CALL)
    openai = OpenAI(base_url="http://localhost/v1", api_key="none", http_client=client, max_retries=0)
    request: Any = {"model": "tiny", "messages": HELLO, "tools": [WEATHER], "max_tokens": 200}
    message = openai.chat.completions.create(**request).choices[0].message
    assert message.content is None
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.name == "weather"  # type: ignore[union-attr]  # it is no custom one
    with openai.chat.completions.stream(**request) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls is not None
    assert final.message.tool_calls[0].function.arguments == '{"city": "Köln 🙂"}'


def test_without_tools_or_choice_calls_are_text(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, engine, CALL)
    for fields in ({"tools": None}, {"tool_choice": "none"}):
        choice = asked(client, **fields)["choices"][0]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", CALL)
        assert choice["message"]["tool_calls"] is None


def test_an_answer_cut_in_a_call_says_so(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, engine, CALL)
    num_tokens = len(engine.tokenizer(CALL.partition("Köln")[0], add_special_tokens=False)["input_ids"])
    choice = asked(client, max_tokens=num_tokens)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"city": "')


def test_log_probabilities_of_a_call_all_come(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, engine, f"So {CALL}")
    fields = {"logprobs": True, "top_logprobs": 1}
    whole = asked(client, **fields)["choices"][0]["logprobs"]["content"]
    parts = [each["logprobs"] for each in streamed(client, tools=[WEATHER, NOW], **fields) if each.get("logprobs")]
    tokens = [token["token"] for part in parts for token in part["content"]]
    assert tokens == [each["token"] for each in whole]


def test_a_template_without_a_place_shows_everything_all_the_same(client: TestClient, engine: Engine) -> None:
    seen = prompt_of(engine, client, tools=[WEATHER, NOW], messages=CALLED)
    for part in ('"name": "weather"', "of a city", "I look.", '{"city": "Bonn"}', "It is sunny.", "Noon <|im_end|>."):
        assert part in seen
    system, user, assistant, results, speaks = seen.split("<|im_start|>")[1:]
    assert [each.partition("\n")[0] for each in (system, user, assistant, results, speaks)] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]


def test_instructions_stay_where_they_are(client: TestClient, engine: Engine) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    seen = prompt_of(engine, client, tools=[NOW], messages=messages)
    assert seen.startswith("<|im_start|>system\nBe brief.\n\nYou can call")
    assert seen.count("<|im_start|>system") == 1


def test_a_template_with_a_place_is_used(
    make_client: MakeClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", HERMES_TEMPLATE)
    client = make_client(default_tools=False)
    say(monkeypatch, engine, CALL)
    answer = asked(client, messages=CALLED)
    assert answer["usage"]["tools"] == "template"
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    seen = prompt_of(engine, client, tools=[WEATHER], messages=CALLED)
    shown = engine.tokenizer.apply_chat_template(
        [
            *HELLO,
            {
                **CALLED[1],
                "tool_calls": [
                    {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
                    for call in CALLED[1]["tool_calls"]  # type: ignore[union-attr]  # they are dicts
                ],
            },
            CALLED[2],
            {**CALLED[3], "content": "Noon <|im_end|>."},
        ],
        tools=[WEATHER],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert seen == shown


def test_no_default_tools(make_client: MakeClient) -> None:
    client = make_client(default_tools=False)
    error = error_of(client.post(CHAT, json=chat(tools=[NOW])))
    assert (error["code"], error["param"]) == ("tools_not_supported", "tools")
    error = error_of(client.post(CHAT, json=chat(messages=CALLED)))
    assert (error["code"], error["param"]) == ("tools_not_supported", "messages")


def test_what_a_template_drops_at_times_is_refused(
    make_client: MakeClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template may show results in general and drop one all the same, such as all but the last."""
    forgetful = HERMES_TEMPLATE.replace(
        "{{ message['content'] }}", "{{ message['content'] if loop.revindex < 3 or message.role != 'tool' }}"
    )
    monkeypatch.setattr(engine.tokenizer, "chat_template", forgetful)
    client = make_client()
    assert client.post(CHAT, json=chat(messages=CALLED)).status_code == 200
    error = error_of(client.post(CHAT, json=chat(messages=[*CALLED, *HELLO, *HELLO])))
    assert error["code"] == "template_error"
    assert "messages[2].content" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}, "tools": [NOW]}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [NOW]}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": [NOW]}, "tool_choice.function"),
        ({"tool_choice": {"type": "custom", "name": "x"}, "tools": [NOW]}, "tool_choice.type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ],
)
def test_what_cannot_be_chosen_is_refused(client: TestClient, fields: dict[str, Any], param: str) -> None:
    error = error_of(client.post(CHAT, json=chat(**fields)))
    assert error["param"] == param


def test_contexts_keep_tools_and_calls(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    made = client.post("/v1/contexts", json={"model": "tiny", "messages": HELLO, "tools": [WEATHER]})
    context_id = made.json()["id"]
    say(monkeypatch, engine, CALL)
    fields: dict[str, Any] = {"context_id": context_id, "store": True, "max_tokens": 200}
    first = client.post(CHAT, json=chat(messages=[], **fields)).json()
    assert first["choices"][0]["finish_reason"] == "tool_calls"
    assert first["usage"]["tools"] == "default"
    result = {"role": "tool", "tool_call_id": "c1", "content": "It is sunny."}
    second = client.post(CHAT, json=chat(messages=[result], **fields))
    assert second.status_code == 200, second.text
    assert client.delete(f"/v1/contexts/{context_id}").status_code == 200


def test_reasoning_has_a_field_of_its_own(
    make_client: MakeClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinking = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{# </think> #}{% endif %}")
    monkeypatch.setattr(engine.tokenizer, "chat_template", thinking)
    client = make_client()
    say(monkeypatch, engine, "Hm.\n</think>\n\nFour.")
    message = asked(client, tools=None)["choices"][0]["message"]
    assert (message["reasoning_content"], message["reasoning"], message["content"]) == ("Hm.", "Hm.", "Four.")
    deltas = [each["delta"] for each in streamed(client)]
    assert "".join(each.get("reasoning_content") or "" for each in deltas) == "Hm."
    assert "".join(each.get("content") or "" for each in deltas) == "Four."


ENUM: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bonn", "Köln 🙂"]}, "days": {"enum": [1, 2]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "now"}),
        ({"type": "function", "function": {"name": "now"}}, {"now"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "weather"}}],
                },
            },
            {"weather"},
        ),
    ],
)
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, HERMES_TEMPLATE])
def test_a_call_that_is_required_comes(
    make_client: MakeClient,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    choice: Any,
    names: set[str],
    template: str,
) -> None:
    """A model of random weights makes it, too."""
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    client = make_client()
    fields = {"tools": [ENUM, NOW], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 200}
    message = asked(client, **fields)["choices"][0]
    (call,) = message["message"]["tool_calls"]
    assert message["finish_reason"] == "tool_calls"
    assert call["function"]["name"] in names
    arguments = json.loads(call["function"]["arguments"])
    assert call["function"]["name"] == "now" or (
        arguments["city"] in ("Bonn", "Köln 🙂") and arguments["days"] in (1, 2)
    )
    deltas = [each["delta"] for each in streamed(client, **fields)]
    pieces = [delta["function"] for each in deltas for delta in each.get("tool_calls", [])]
    assert pieces[0]["name"] == call["function"]["name"]
    assert "".join(each["arguments"] for each in pieces) == call["function"]["arguments"]


def test_strict_schemas_that_cannot_be_followed_are_refused(client: TestClient) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "contentEncoding": "base64", "not": {}}}}
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}
    assert "not" in error_of(client.post(CHAT, json=chat(tools=[tool])))["message"]
