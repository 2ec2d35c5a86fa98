"""pydantic-ai: by chat completions and by responses."""

from __future__ import annotations

import asyncio

from checking import QUESTION, Server, Weather, main
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel):
    """What is wanted of the model."""

    name: str
    country: str


def models_of(server: Server) -> list[Model]:
    provider = OpenAIProvider(base_url=server.url, api_key="unused")
    return [OpenAIChatModel(server.model, provider=provider), OpenAIResponsesModel(server.model, provider=provider)]


def tool(server: Server) -> None:
    for model in models_of(server):
        weather = Weather()
        agent = Agent(model, tools=[weather.get_weather], instructions="You are a helpful agent.")
        weather.require_called(agent.run_sync(QUESTION).output)


def tool_streamed(server: Server) -> None:
    async def text_of(model: Model, weather: Weather) -> str:
        async with Agent(model, tools=[weather.get_weather]).run_stream(QUESTION) as run:
            return "".join([piece async for piece in run.stream_text(delta=True)])

    for model in models_of(server):
        weather = Weather()
        weather.require_called(asyncio.run(text_of(model, weather)))


def structured(server: Server) -> None:
    for model in models_of(server):
        for wanted in (City, ToolOutput(City), NativeOutput(City)):
            answer = Agent(model, output_type=wanted).run_sync("Tell me about Paris.").output
            assert isinstance(answer, City), (wanted, answer)


def structured_after_a_tool(server: Server) -> None:
    weather = Weather()
    agent = Agent(models_of(server)[0], tools=[weather.get_weather], output_type=City)
    assert isinstance(agent.run_sync(QUESTION).output, City)
    weather.require_called()


if __name__ == "__main__":
    main(tool, tool_streamed, structured, structured_after_a_tool)
