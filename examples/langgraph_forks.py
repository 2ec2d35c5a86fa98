"""A LangGraph agent with a tool, whose sub-agents each fork one context: the report is read once, by all of them.

kvcomm serve --model MODEL        # one that calls tools
pip install langchain langchain-openai langgraph httpx
python examples/langgraph_forks.py [ADDRESS] [MODEL]
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

REPORT = (
    "Report on the bridge. It was built in 1931, of riveted steel, and carries 14,000 vehicles a day. Three of its "
    "forty bearings are worn. The paint of the lower chord is gone in places, with rust of up to two millimetres. "
    "A repair takes nine weeks and costs 1.2 million; a new bridge takes three years and costs 31 million."
)
EXPERTS = {"engineer": "Is the bridge safe?", "treasurer": "What should be paid for?", "editor": "Give it a headline."}


class Experts:
    """Sub-agents that have read the report."""

    def __init__(self, address: str, model: str) -> None:
        self._http = httpx.Client(base_url=f"{address}/v1", timeout=60)
        self._address, self._model = address, model
        read = [{"role": "system", "content": "You have read a report."}, {"role": "user", "content": REPORT}]
        answer = {"role": "assistant", "content": "I have read it."}
        self._context = self._post("/contexts", {"model": model, "messages": [*read, answer], "name": "report"})

    def close(self) -> None:
        """Give the context back, with all that was forked from it."""
        self._http.delete(f"/contexts/{self._context['id']}", params={"descendants": True}).raise_for_status()
        self._http.close()

    def consult(self, topic: str) -> str:
        """Ask the experts who have read the report about a topic."""
        with ThreadPoolExecutor() as pool:
            return "\n".join(pool.map(lambda expert: self._ask(expert, topic), EXPERTS))

    def _ask(self, expert: str, topic: str) -> str:
        fork = self._post(f"/contexts/{self._context['id']}/fork", {"name": expert})  # copies nothing
        chat = ChatOpenAI(
            base_url=f"{self._address}/v1",
            api_key=SecretStr("unused"),
            model=self._model,
            max_completion_tokens=60,
            extra_body={"context_id": fork["id"], "store": True},
        )
        answer = chat.invoke([HumanMessage(f"As the {expert}, about {topic}: {EXPERTS[expert]}")])
        assert answer.usage_metadata is not None
        cached = answer.usage_metadata["input_token_details"].get("cache_read", 0)
        print(f"{expert}: {cached} of {answer.usage_metadata['input_tokens']} tokens were there: {answer.content}")
        return f"{expert}: {answer.content}"

    def _post(self, path: str, body: dict[str, object]) -> dict[str, str]:
        response = self._http.post(path, json=body)
        response.raise_for_status()
        return dict(response.json())


def main(address: str = "http://127.0.0.1:8000", model: str = "smollm2-135m") -> None:
    """One agent asks the others."""
    chat = ChatOpenAI(base_url=f"{address}/v1", api_key=SecretStr("unused"), model=model, max_completion_tokens=200)
    experts = Experts(address, model)
    try:
        agent = create_agent(chat, [experts.consult], system_prompt="Consult the experts before you answer.")
        result = agent.invoke({"messages": [{"role": "user", "content": "What shall we do about the bridge?"}]})
        print("agent:", result["messages"][-1].content)
    finally:
        experts.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
