"""The official Anthropic client: a tool, an answer as it comes, and what `cache_control` keeps.

kvcomm serve --model smollm2-135m
pip install anthropic
python examples/anthropic_client.py [ADDRESS] [MODEL]
"""

from __future__ import annotations

import sys

from anthropic import Anthropic
from anthropic.types import MessageParam, TextBlockParam, ToolParam, ToolResultBlockParam

QUESTION = "What is the weather in Paris?"
WEATHER_TOOL: ToolParam = {
    "name": "get_weather",
    "description": "The weather of a city now.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 40}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "cache_control": {"type": "ephemeral"},  # keep what stands before this, the tool included
}
SYSTEM: list[TextBlockParam] = [
    {"type": "text", "text": "You tell the weather.", "cache_control": {"type": "ephemeral"}}
]


def get_weather(city: str) -> str:
    """The tool. It would ask somebody who knows."""
    return f"sunny, 21 degrees in {city}"


def main(address: str = "http://127.0.0.1:8000", model: str = "smollm2-135m") -> None:
    """A call, its result, and the answer in pieces."""
    with Anthropic(base_url=address, api_key="unused") as client:
        messages: list[MessageParam] = [{"role": "user", "content": QUESTION}]
        num_tokens = client.messages.count_tokens(model=model, system=SYSTEM, tools=[WEATHER_TOOL], messages=messages)
        print(f"the prompt has {num_tokens.input_tokens} tokens")
        first = client.messages.create(
            model=model,
            max_tokens=100,
            system=SYSTEM,
            tools=[WEATHER_TOOL],
            tool_choice={"type": "any"},  # leave it out for a model that calls tools by itself
            messages=messages,
        )
        results: list[ToolResultBlockParam] = []
        for block in first.content:
            if block.type == "tool_use":
                result = get_weather(**block.input)
                print(f"{block.name}({block.input}) gave {result}")
                results.append({"type": "tool_result", "tool_use_id": block.id, "content": result})
        messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
        with client.messages.stream(
            model=model, max_tokens=40, system=SYSTEM, tools=[WEATHER_TOOL], messages=messages
        ) as stream:
            for text in stream.text_stream:
                print(text, end="", flush=True)
            usage = stream.get_final_message().usage
        print(f"\n{usage.cache_read_input_tokens} input tokens came from the cache, {usage.input_tokens} did not")


if __name__ == "__main__":
    main(*sys.argv[1:])
