"""llama-index over its client for servers that speak OpenAI's protocol."""

from __future__ import annotations

import asyncio

from checking import QUESTION, Server, Weather, main
from llama_index.core.agent.workflow import AgentStream, FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str
    country: str


def llm_of(server: Server) -> OpenAILike:
    return OpenAILike(
        model=server.model,
        api_base=server.url,
        api_key="unused",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=8192,
        max_retries=0,
    )


def tool(server: Server) -> None:
    weather = Weather()

    async def run() -> str:
        agent = FunctionAgent(tools=[weather.get_weather], llm=llm_of(server), streaming=False)
        return str(await agent.run(QUESTION))

    weather.require_called(asyncio.run(run()))


def tool_streamed(server: Server) -> None:
    weather = Weather()

    async def run() -> str:
        agent = FunctionAgent(tools=[weather.get_weather], llm=llm_of(server), system_prompt="You are helpful.")
        handler = agent.run(QUESTION)
        pieces = [event.delta async for event in handler.stream_events() if isinstance(event, AgentStream)]
        await handler
        return "".join(pieces)

    weather.require_called(asyncio.run(run()))


def structured(server: Server) -> None:
    prompt = PromptTemplate("Tell me about {city}.")
    answer = llm_of(server).structured_predict(City, prompt, city="Paris")
    assert isinstance(answer, City), answer


def structured_llm(server: Server) -> None:
    answer = llm_of(server).as_structured_llm(City).chat([ChatMessage("Tell me about Paris.")])
    assert isinstance(answer.raw, City), answer


if __name__ == "__main__":
    main(tool, tool_streamed, structured, structured_llm)
