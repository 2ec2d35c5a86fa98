"""openai-python: chat completions and responses."""

from __future__ import annotations

import json
from typing import Any

from checking import QUESTION, Server, Weather, main
from openai import OpenAI
from pydantic import BaseModel

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "Weather of a city", "parameters": PARAMETERS, "strict": True}


class City(BaseModel):
    """What is wanted of the model."""

    name: str
    country: str
    num_people: int


def client_of(server: Server) -> OpenAI:
    return OpenAI(base_url=server.url, api_key="unused", max_retries=0)


def tool(server: Server) -> None:
    client, weather = client_of(server), Weather()
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    settings: Any = {"model": server.model, "tools": [{"type": "function", "function": FUNCTION}]}
    first = client.chat.completions.create(messages=messages, **settings).choices[0]
    assert first.finish_reason == "tool_calls", first
    messages.append(first.message)
    for call in first.message.tool_calls or []:
        result = weather.get_weather(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    last = client.chat.completions.create(messages=messages, **settings).choices[0]
    assert last.finish_reason == "stop", last
    weather.require_called(last.message.content)


def tool_required(server: Server) -> None:
    client, weather = client_of(server), Weather()
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        answer = client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": QUESTION}],
            tools=[{"type": "function", "function": FUNCTION}],
            tool_choice=choice,
        )
        (call,) = answer.choices[0].message.tool_calls
        weather.cities.clear()
        weather.get_weather(**json.loads(call.function.arguments))
        weather.require_called()


def tool_streamed(server: Server) -> None:
    client, weather = client_of(server), Weather()
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    settings: Any = {"model": server.model, "tools": [{"type": "function", "function": FUNCTION}], "stream": True}
    calls: dict[int, dict[str, str]] = {}
    for chunk in client.chat.completions.create(messages=messages, **settings):
        for delta in chunk.choices[0].delta.tool_calls or [] if chunk.choices else []:
            call = calls.setdefault(delta.index, {"id": "", "name": "", "arguments": ""})
            call["id"] += delta.id or ""
            call["name"] += delta.function.name or ""
            call["arguments"] += delta.function.arguments or ""
    functions = [{"name": each["name"], "arguments": each["arguments"]} for each in calls.values()]
    listed = [
        {"id": c["id"], "type": "function", "function": f} for c, f in zip(calls.values(), functions, strict=True)
    ]
    messages.append({"role": "assistant", "content": None, "tool_calls": listed})
    for call in calls.values():
        result = weather.get_weather(**json.loads(call["arguments"]))
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    pieces = client.chat.completions.create(messages=messages, **settings)
    weather.require_called("".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices))


def tool_streamed_by_helper(server: Server) -> None:
    client, weather = client_of(server), Weather()
    with client.chat.completions.stream(
        model=server.model,
        messages=[{"role": "user", "content": QUESTION}],
        tools=[{"type": "function", "function": FUNCTION}],
    ) as stream:
        names = [event.name for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert names == ["get_weather"], names
    (call,) = stream.get_final_completion().choices[0].message.tool_calls
    weather.get_weather(**call.function.parsed_arguments)
    weather.require_called()


def tool_by_responses(server: Server) -> None:
    client, weather = client_of(server), Weather()
    settings: Any = {"model": server.model, "tools": [{"type": "function", **FUNCTION}]}
    first = client.responses.create(input=QUESTION, **settings)
    results = [
        {
            "type": "function_call_output",
            "call_id": item.call_id,
            "output": weather.get_weather(**json.loads(item.arguments)),
        }
        for item in first.output
        if item.type == "function_call"
    ]
    by_id = client.responses.create(input=results, previous_response_id=first.id, **settings)
    weather.require_called(by_id.output_text)
    replayed = client.responses.create(
        input=[{"role": "user", "content": QUESTION}, *first.output, *results], store=False, **settings
    )
    weather.require_called(replayed.output_text)


def tool_streamed_by_responses(server: Server) -> None:
    client, weather = client_of(server), Weather()
    settings: Any = {"model": server.model, "tools": [{"type": "function", **FUNCTION}]}
    with client.responses.stream(input=QUESTION, **settings) as stream:
        kinds = [event.type for event in stream]
        first = stream.get_final_response()
    assert "response.function_call_arguments.done" in kinds, kinds
    (call,) = [item for item in first.output if item.type == "function_call"]
    result = weather.get_weather(**json.loads(call.arguments))
    with client.responses.stream(
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": result}],
        previous_response_id=first.id,
        **settings,
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    weather.require_called(text)


def structured(server: Server) -> None:
    messages: Any = [{"role": "user", "content": "Tell me about Paris."}]
    answer = client_of(server).chat.completions.parse(model=server.model, messages=messages, response_format=City)
    assert isinstance(answer.choices[0].message.parsed, City), answer


def structured_streamed(server: Server) -> None:
    messages: Any = [{"role": "user", "content": "Tell me about Paris."}]
    with client_of(server).chat.completions.stream(
        model=server.model, messages=messages, response_format=City
    ) as stream:
        answer = stream.get_final_completion()
    assert isinstance(answer.choices[0].message.parsed, City), answer


def structured_object(server: Server) -> None:
    answer = client_of(server).chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "Tell me about Paris in JSON."}],
        response_format={"type": "json_object"},
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict), answer


def structured_by_responses(server: Server) -> None:
    answer = client_of(server).responses.parse(model=server.model, input="Tell me about Paris.", text_format=City)
    assert isinstance(answer.output_parsed, City), answer


if __name__ == "__main__":
    main(
        tool,
        tool_required,
        tool_streamed,
        tool_streamed_by_helper,
        tool_by_responses,
        tool_streamed_by_responses,
        structured,
        structured_streamed,
        structured_object,
        structured_by_responses,
    )
