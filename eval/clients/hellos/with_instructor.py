"""instructor: a model's answer as a Pydantic object, by a tool or by a JSON schema."""

from __future__ import annotations

import instructor
from checking import Server, main
from openai import OpenAI
from pydantic import BaseModel, Field


class City(BaseModel):
    """A city."""

    name: str
    num_people: int = Field(ge=0)


MESSAGES = [{"role": "user", "content": "Extract: Paris has 2,100,000 inhabitants."}]


def client_of(server: Server, mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(OpenAI(base_url=server.url, api_key="unused", max_retries=0), mode=mode)


def tool(server: Server) -> None:
    for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT):
        city = client_of(server, mode).create(model=server.model, messages=MESSAGES, response_model=City, max_retries=0)
        assert city.name == "Paris", (mode, city)


def tool_streamed(server: Server) -> None:
    client = client_of(server, instructor.Mode.TOOLS)
    states = list(client.create_partial(model=server.model, messages=MESSAGES, response_model=City, max_retries=0))
    assert len(states) > 1, states
    assert states[-1].name == "Paris", states


def structured(server: Server) -> None:
    client = client_of(server, instructor.Mode.JSON_SCHEMA)
    city = client.create(model=server.model, messages=MESSAGES, response_model=City, max_retries=0)
    assert isinstance(city, City), city


if __name__ == "__main__":
    main(tool, tool_streamed, structured)
