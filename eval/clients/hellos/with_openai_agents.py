"""openai-agents: by responses, its default, and by chat completions."""

from __future__ import annotations

import asyncio

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from checking import LAST_WORDS, QUESTION, Server, Weather, main
from openai import AsyncOpenAI
from pydantic import BaseModel

Model = OpenAIChatCompletionsModel | OpenAIResponsesModel
INSTRUCTIONS = "You are a helpful agent."


class City(BaseModel):
    """What is wanted of the model."""

    name: str
    country: str


def models_of(server: Server) -> list[Model]:
    """Each with a client of its own: one's connections do not outlive the event loop that made them."""
    return [
        each(server.model, AsyncOpenAI(base_url=server.url, api_key="unused", max_retries=0))
        for each in (OpenAIResponsesModel, OpenAIChatCompletionsModel)
    ]


def agent_of(model: Model, weather: Weather) -> Agent:
    return Agent("weather", instructions=INSTRUCTIONS, model=model, tools=[function_tool(weather.get_weather)])


def tool(server: Server) -> None:
    for model in models_of(server):
        weather = Weather()
        weather.require_called(asyncio.run(Runner.run(agent_of(model, weather), QUESTION)).final_output)


def tool_required(server: Server) -> None:
    for model in models_of(server):
        weather = Weather()
        agent = agent_of(model, weather).clone(model_settings=ModelSettings(tool_choice="required"))
        weather.require_called(asyncio.run(Runner.run(agent, QUESTION)).final_output)


def tool_streamed(server: Server) -> None:
    async def deltas(model: Model, weather: Weather) -> str:
        run = Runner.run_streamed(agent_of(model, weather), QUESTION)
        pieces = [
            event.data.delta
            async for event in run.stream_events()
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
        ]
        return "".join(pieces)

    for model in models_of(server):
        weather = Weather()
        weather.require_called(asyncio.run(deltas(model, weather)))


def tool_handoff(server: Server) -> None:
    for model in models_of(server):
        expert = Agent("expert", handoff_description="Knows the weather.", instructions=INSTRUCTIONS, model=model)
        triage = Agent("triage", instructions="Hand off to the expert.", model=model, handoffs=[expert])
        result = asyncio.run(Runner.run(triage, QUESTION))
        assert result.last_agent is expert, result
        assert LAST_WORDS in result.final_output, result


def structured(server: Server) -> None:
    for model in models_of(server):
        agent = Agent("geographer", instructions=INSTRUCTIONS, model=model, output_type=City)
        answer = asyncio.run(Runner.run(agent, "Tell me about Paris.")).final_output
        assert isinstance(answer, City), answer


if __name__ == "__main__":
    set_tracing_disabled(True)
    main(tool, tool_required, tool_streamed, tool_handoff, structured)
