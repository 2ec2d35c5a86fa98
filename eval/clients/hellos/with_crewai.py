"""CrewAI: an agent with a tool, and a task whose output is a Pydantic object."""

from __future__ import annotations

import os

os.environ |= {"CREWAI_DISABLE_TELEMETRY": "true", "OTEL_SDK_DISABLED": "true", "CREWAI_TRACING_ENABLED": "false"}

from checking import QUESTION, Server, Weather, main  # telemetry is switched off before
from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool as as_tool
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str
    country: str


def kickoff(server: Server, weather: Weather | None, *, stream: bool = False, output: type[BaseModel] | None = None):
    llm = LLM(model=f"hosted_vllm/{server.model}", base_url=server.url, api_key="unused", stream=stream)
    tools = [] if weather is None else [as_tool("get_weather")(weather.get_weather)]
    agent = Agent(role="meteorologist", goal="Tell the weather", backstory="You know it.", tools=tools, llm=llm)
    task = Task(description=QUESTION, expected_output="The weather.", agent=agent, output_pydantic=output)
    return Crew(agents=[agent], tasks=[task], verbose=False).kickoff()


def tool(server: Server) -> None:
    weather = Weather()
    weather.require_called(kickoff(server, weather))


def tool_streamed(server: Server) -> None:
    weather = Weather()
    weather.require_called(kickoff(server, weather, stream=True))


def structured(server: Server) -> None:
    answer = kickoff(server, None, output=City)
    assert isinstance(answer.pydantic, City), answer


if __name__ == "__main__":
    main(tool, tool_streamed, structured)
