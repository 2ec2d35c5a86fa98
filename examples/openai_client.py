"""The official OpenAI client: an answer as it comes, a tool, structured output, and the Responses API.

    kvcomm serve --model smollm2-135m
    pip install openai
    python examples/openai_client.py [ADDRESS] [MODEL]

The small packaged model calls no tool by itself, so it is told to: leave out `tool_choice` for a model that does.
"""

from __future__ import annotations

import json
import sys

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

QUESTION = "What is the weather in Paris?"
WEATHER_TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 40}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


class City(BaseModel):
    """What structured output is wanted of."""

    name: str
    country: str
    is_capital: bool


def get_weather(city: str) -> str:
    """The tool. It would ask somebody who knows."""
    return f"sunny, 21 degrees in {city}"


def chat(client: OpenAI, model: str) -> None:
    """An answer in pieces, and where its prompt's tokens came from."""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if chunk.usage and chunk.usage.prompt_tokens_details:
            cached = chunk.usage.prompt_tokens_details.cached_tokens
            print(f"\nchat: {cached} of {chunk.usage.prompt_tokens} prompt tokens were cached")


def tools(client: OpenAI, model: str) -> None:
    """A call, its result, and the answer."""
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": QUESTION}]
    first = client.chat.completions.create(
        model=model, messages=messages, tools=[WEATHER_TOOL], tool_choice="required", max_tokens=100
    )
    message = first.choices[0].message
    messages.append(message.to_dict())  # type: ignore[arg-type]  # an answer is a message of the conversation, too
    for call in message.tool_calls or []:
        assert call.type == "function"
        result = get_weather(**json.loads(call.function.arguments))
        print(f"tools: {call.function.name}({call.function.arguments}) gave {result}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    last = client.chat.completions.create(model=model, messages=messages, tools=[WEATHER_TOOL], max_tokens=40)
    print("tools:", last.choices[0].message.content)


def structured(client: OpenAI, model: str) -> None:
    """An answer that is an object of a class."""
    answer = client.chat.completions.parse(
        model=model,
        messages=[{"role": "user", "content": "Describe Paris."}],
        response_format=City,
        max_tokens=200,
    )
    print("structured:", repr(answer.choices[0].message.parsed))


def responses(client: OpenAI, model: str) -> None:
    """A stored response is a context: what goes on from it is not computed again."""
    first = client.responses.create(model=model, input="Name a city.", max_output_tokens=40)
    print("responses:", first.output_text)
    second = client.responses.create(
        model=model, input="And a second one?", previous_response_id=first.id, max_output_tokens=40
    )
    print("responses:", second.output_text)
    assert second.usage is not None
    cached = second.usage.input_tokens_details.cached_tokens
    print(f"responses: {cached} of {second.usage.input_tokens} input tokens were there already")
    client.responses.delete(second.id)
    client.responses.delete(first.id)


def main(address: str = "http://127.0.0.1:8000", model: str = "smollm2-135m") -> None:
    """All of it in turn."""
    with OpenAI(base_url=f"{address}/v1", api_key="unused") as client:
        chat(client, model)
        tools(client, model)
        structured(client, model)
        responses(client, model)


if __name__ == "__main__":
    main(*sys.argv[1:])
