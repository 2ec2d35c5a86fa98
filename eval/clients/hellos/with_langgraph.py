"""LangGraph by LangChain's agents, over langchain-openai."""

from __future__ import annotations

from checking import QUESTION, Server, Weather, main
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessageChunk
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr


class City(BaseModel):
    """What is wanted of the model."""

    name: str
    country: str


def chat_of(server: Server) -> ChatOpenAI:
    return ChatOpenAI(base_url=server.url, api_key=SecretStr("unused"), model=server.model, max_retries=0)


def ask(text: str = QUESTION) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": "user", "content": text}]}


def tool(server: Server) -> None:
    weather = Weather()
    agent = create_agent(chat_of(server), [weather.get_weather], system_prompt="You are a helpful agent.")
    weather.require_called(agent.invoke(ask())["messages"][-1].content)


def tool_streamed(server: Server) -> None:
    weather = Weather()
    agent = create_agent(chat_of(server), [weather.get_weather])
    pieces = [piece for piece, _ in agent.stream(ask(), stream_mode="messages") if isinstance(piece, AIMessageChunk)]
    assert len(pieces) > 2, pieces
    assert any(piece.tool_call_chunks for piece in pieces), pieces
    weather.require_called("".join(str(piece.content) for piece in pieces))


def tool_by_responses(server: Server) -> None:
    weather = Weather()
    chat = ChatOpenAI(
        base_url=server.url, api_key=SecretStr("unused"), model=server.model, max_retries=0, use_responses_api=True
    )
    weather.require_called(create_agent(chat, [weather.get_weather]).invoke(ask())["messages"][-1].content)


def structured(server: Server) -> None:
    for method in ("json_schema", "function_calling"):
        answer = chat_of(server).with_structured_output(City, method=method).invoke("Tell me about Paris.")
        assert isinstance(answer, City), (method, answer)


def structured_agent(server: Server) -> None:
    for strategy in (ProviderStrategy(City), ToolStrategy(City)):
        answer = create_agent(chat_of(server), [], response_format=strategy).invoke(ask("Tell me about Paris."))
        assert isinstance(answer["structured_response"], City), (strategy, answer)


if __name__ == "__main__":
    main(tool, tool_streamed, tool_by_responses, structured, structured_agent)
