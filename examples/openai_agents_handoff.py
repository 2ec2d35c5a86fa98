"""openai-agents: one agent hands the conversation to another, which has a tool.

    kvcomm serve --model MODEL        # one that calls tools
    pip install openai-agents
    python examples/openai_agents_handoff.py [ADDRESS] [MODEL]

The library speaks the Responses API unless it is told otherwise; kvcomm serves both.
"""

from __future__ import annotations

import asyncio
import sys

from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI


@function_tool
def get_weather(city: str) -> str:
    """The weather of a city now."""
    return f"sunny, 21 degrees in {city}"


async def run(address: str, model: str) -> None:
    """A question goes to the one who sorts, and on to the one who knows."""
    set_tracing_disabled(True)  # traces would go to OpenAI
    served = OpenAIResponsesModel(model, AsyncOpenAI(base_url=f"{address}/v1", api_key="unused"))
    settings = ModelSettings(max_tokens=200)
    meteorologist = Agent(
        "Meteorologist",
        handoff_description="Knows the weather everywhere.",
        instructions="Tell the weather.",
        tools=[get_weather],
        model=served,
        model_settings=settings,
    )
    triage = Agent(
        "Triage",
        instructions="Hand each question to the agent who knows.",
        handoffs=[meteorologist],
        model=served,
        model_settings=settings,
    )
    result = await Runner.run(triage, "What is the weather in Paris?")
    for item in result.new_items:
        print(f"{item.agent.name}: {item.type}")
    print(f"{result.last_agent.name} says: {result.final_output}")


def main(address: str = "http://127.0.0.1:8000", model: str = "smollm2-135m") -> None:
    """Run it."""
    asyncio.run(run(address, model))


if __name__ == "__main__":
    main(*sys.argv[1:])
