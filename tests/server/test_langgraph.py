"""A LangGraph team through its own OpenAI client: agents that read the same text share its KV."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from pydantic import SecretStr

from kvcomm.engine.engine import Engine
from kvcomm.server.settings import ServerSettings
from tests.limits import PATIENCE_S, wait_for
from tests.server.conftest import MODEL
from tests.server.live import serving

MATERIAL = "three apples and two pears lie on the table. ann takes one apple. bob takes both pears. "
QUESTION = "how many apples are left?"


class Work(TypedDict, total=False):
    """What the agents of the graph hand on."""

    solution: AIMessage
    review: AIMessage


@pytest.fixture
def chat(engine: Engine) -> Iterator[ChatOpenAI]:
    """The framework's client as a user makes it, on a server without keys."""
    with serving(engine, ServerSettings(model=MODEL, port=0)) as live:
        yield ChatOpenAI(
            base_url=f"{live.url}/v1",
            api_key=SecretStr("unused"),
            model=MODEL,
            temperature=0,
            max_completion_tokens=8,
            timeout=PATIENCE_S,
            max_retries=0,
            stream_usage=True,
        )
        wait_for(lambda: live.state.admission.num_in_flight == 0)


def team(chat: ChatOpenAI) -> Any:
    """One agent solves, the next reviews; both read the same material first."""

    def agent(name: str, prompt: Callable[[Work], list[BaseMessage]]) -> Callable[[Work], Work]:
        def act(work: Work) -> Work:
            return {name: chat.invoke([SystemMessage(MATERIAL), *prompt(work)])}  # type: ignore[misc]

        return act

    graph = StateGraph(Work)
    graph.add_node("solver", agent("solution", lambda work: [HumanMessage(QUESTION)]))
    graph.add_node(
        "critic",
        agent("review", lambda work: [HumanMessage(QUESTION), work["solution"], HumanMessage("is that right?")]),
    )
    graph.add_edge(START, "solver")
    graph.add_edge("solver", "critic")
    graph.add_edge("critic", END)
    return graph.compile()


def cached(message: AIMessage) -> int:
    """Prompt tokens from the cache, as the framework tells."""
    assert message.usage_metadata is not None
    return message.usage_metadata["input_token_details"].get("cache_read", 0)


def test_the_second_agent_of_a_graph_reads_what_the_first_has_read_and_said(chat: ChatOpenAI, engine: Engine) -> None:
    work = team(chat).invoke({})
    solution, review = work["solution"], work["review"]
    assert cached(solution) == 0
    # Everything but what is new to it: the critic's prompt goes on where the solver's and its answer end.
    assert cached(review) >= solution.usage_metadata["input_tokens"] - engine.config.page_size
    assert review.response_metadata["finish_reason"] in ("stop", "length")
    assert team(chat).invoke({})["review"].content == review.content


def test_streams_add_up(chat: ChatOpenAI) -> None:
    messages = [SystemMessage(MATERIAL), HumanMessage(QUESTION)]
    pieces = list(chat.stream(messages))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole + piece
    assert isinstance(whole, AIMessageChunk)
    assert whole.content == chat.invoke(messages).content
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 0


def test_agents_at_once(chat: ChatOpenAI) -> None:
    prompts: list[list[BaseMessage]] = [[SystemMessage(MATERIAL), HumanMessage(f"{QUESTION} {n}")] for n in range(4)]

    async def ask() -> list[AIMessage]:
        return list(await asyncio.gather(*(chat.ainvoke(prompt) for prompt in prompts)))

    answers = asyncio.run(ask())
    assert [answer.content for answer in answers] == [chat.invoke(prompt).content for prompt in prompts]
