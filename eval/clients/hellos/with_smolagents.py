"""smolagents: an agent that calls tools, and a model's answer by a JSON schema."""

from __future__ import annotations

import json

from checking import QUESTION, RESULT, Server, main
from smolagents import ChatMessageStreamDelta, OpenAIModel, Tool, ToolCallingAgent


class GetWeather(Tool):
    """The weather as smolagents has tools."""

    name = "get_weather"
    description = "Get the weather of a city."
    inputs = {"city": {"type": "string", "description": "name of the city"}}  # noqa: RUF012  # as they have it
    output_type = "string"

    def __init__(self) -> None:
        super().__init__()
        self.cities: list[str] = []

    def forward(self, city: str) -> str:
        """The same everywhere."""
        self.cities.append(city)
        return RESULT


def model_of(server: Server) -> OpenAIModel:
    return OpenAIModel(model_id=server.model, api_base=server.url, api_key="unused", client_kwargs={"max_retries": 0})


def tool(server: Server) -> None:
    weather = GetWeather()
    answer = ToolCallingAgent(tools=[weather], model=model_of(server), max_steps=3, verbosity_level=0).run(QUESTION)
    assert weather.cities == ["Paris"], weather.cities
    assert answer, answer


def tool_streamed(server: Server) -> None:
    weather = GetWeather()
    agent = ToolCallingAgent(
        tools=[weather], model=model_of(server), max_steps=3, verbosity_level=0, stream_outputs=True
    )
    steps = list(agent.run(QUESTION, stream=True))
    assert weather.cities == ["Paris"], weather.cities
    assert any(isinstance(step, ChatMessageStreamDelta) for step in steps), steps


def structured(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "country": {"type": "string"}},
        "required": ["name", "country"],
        "additionalProperties": False,
    }
    answer = model_of(server).generate(
        [{"role": "user", "content": [{"type": "text", "text": "Tell me about Paris."}]}],
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}},
    )
    assert set(json.loads(answer.content)) == {"name", "country"}, answer


if __name__ == "__main__":
    main(tool, tool_streamed, structured)
