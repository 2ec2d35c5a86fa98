"""pydantic-ai: an agent with a tool, and answers that are objects of a class.

kvcomm serve --model smollm2-135m
pip install 'pydantic-ai-slim[openai]'
python examples/pydantic_ai_agent.py [ADDRESS] [MODEL]
"""

from __future__ import annotations

import sys

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings


class Forecast(BaseModel):
    """What is wanted of the model."""

    city: str = Field(max_length=40)
    is_sunny: bool
    degrees: int = Field(ge=-90, le=60)


def get_weather(city: str) -> str:
    """The weather of a city now.

    Args:
        city: its name
    """
    return f"sunny, 21 degrees in {city}"


def main(address: str = "http://127.0.0.1:8000", model: str = "smollm2-135m") -> None:
    """A tool first, then structured output."""
    provider = OpenAIProvider(base_url=f"{address}/v1", api_key="unused")
    served = OpenAIChatModel(model, provider=provider, settings=ModelSettings(max_tokens=200))
    talker = Agent(served, tools=[get_weather], instructions="You tell the weather.")
    answer = talker.run_sync("What is the weather in Paris?")
    print("answer:", answer.output)
    forecaster = Agent(served, output_type=NativeOutput(Forecast))
    forecast = forecaster.run_sync("It is sunny and 21 degrees in Paris.")
    print("forecast:", repr(forecast.output))
    usage = forecast.usage
    print(f"{usage.input_tokens} input tokens, {usage.cache_read_tokens} of them cached")


if __name__ == "__main__":
    main(*sys.argv[1:])
