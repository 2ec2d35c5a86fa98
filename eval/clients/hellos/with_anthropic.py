"""anthropic-sdk-python: messages."""

from __future__ import annotations

from typing import Any

from anthropic import Anthropic, beta_tool
from checking import QUESTION, Server, Weather, main
from pydantic import BaseModel

TOOL: Any = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


class City(BaseModel):
    """What is wanted of the model."""

    name: str
    country: str


def client_of(server: Server) -> Anthropic:
    return Anthropic(base_url=server.address, api_key="unused", max_retries=0)


def results_of(content: Any, weather: Weather) -> list[Any]:
    return [
        {"type": "tool_result", "tool_use_id": block.id, "content": weather.get_weather(**block.input)}
        for block in content
        if block.type == "tool_use"
    ]


def tool(server: Server) -> None:
    client, weather = client_of(server), Weather()
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    settings: Any = {"model": server.model, "max_tokens": 200, "tools": [TOOL]}
    num_tokens = client.messages.count_tokens(model=server.model, messages=messages, tools=[TOOL]).input_tokens
    first = client.messages.create(messages=messages, **settings)
    assert first.stop_reason == "tool_use", first
    assert num_tokens == first.usage.input_tokens + (first.usage.cache_read_input_tokens or 0), (
        num_tokens,
        first.usage,
    )
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": []}]
    messages[-1]["content"] = results_of(first.content, weather)
    last = client.messages.create(messages=messages, **settings)
    assert last.stop_reason == "end_turn", last
    weather.require_called(last.content[0].text)


def tool_choice(server: Server) -> None:
    client, weather = client_of(server), Weather()
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        answer = client.messages.create(
            model=server.model, max_tokens=200, tools=[TOOL], messages=messages, tool_choice=choice
        )
        weather.cities.clear()
        results_of(answer.content, weather)
        weather.require_called()


def tool_streamed(server: Server) -> None:
    client, weather = client_of(server), Weather()
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    settings: Any = {"model": server.model, "max_tokens": 200, "tools": [TOOL]}
    with client.messages.stream(messages=messages, **settings) as stream:
        kinds = {event.type for event in stream}
        first = stream.get_final_message()
    assert {"input_json", "content_block_stop", "message_stop"} <= kinds, kinds
    messages += [{"role": "assistant", "content": first.content}]
    messages += [{"role": "user", "content": results_of(first.content, weather)}]
    with client.messages.stream(messages=messages, **settings) as stream:
        weather.require_called("".join(stream.text_stream))


def tool_by_runner(server: Server) -> None:
    weather = Weather()
    runner = client_of(server).beta.messages.tool_runner(
        model=server.model,
        max_tokens=200,
        tools=[beta_tool(weather.get_weather)],
        messages=[{"role": "user", "content": QUESTION}],
        thread=False,  # else the server has to hold the conversation, which is a beta of Anthropic's own
    )
    weather.require_called(runner.until_done().content[0].text)


def tool_with_cache_control(server: Server) -> None:
    client = client_of(server)
    settings: Any = {
        "model": server.model,
        "max_tokens": 200,
        "tools": [{**TOOL, "cache_control": {"type": "ephemeral"}}],
        "system": [{"type": "text", "text": "You are a helpful agent.", "cache_control": {"type": "ephemeral"}}],
    }
    for ask in (QUESTION, "And what about Rome?"):
        answer = client.messages.create(messages=[{"role": "user", "content": ask}], **settings)
    assert answer.usage.cache_read_input_tokens, answer.usage


def structured(server: Server) -> None:
    answer = client_of(server).messages.parse(
        model=server.model,
        max_tokens=400,
        messages=[{"role": "user", "content": "Tell me about Paris."}],
        output_format=City,
    )
    assert isinstance(answer.parsed_output, City), answer


if __name__ == "__main__":
    main(tool, tool_choice, tool_streamed, tool_by_runner, tool_with_cache_control, structured)
