"""The table of the segment proposal: three agents that share some of their segments, over HTTP, and a second turn.

    python -m eval.segments --agents FOLDER [--model smollm2-135m] [--json]

FOLDER holds `prompts/*`, `bfcl_tool_schemas.json` and `github_mcp_tools.json`: system prompts and tool schemas as they
are in use. Agent 1 brings segments A+B+D, agent 2 A+C+E, agent 3 A+B+E, each before messages of its own; then agent 1
goes on. Then the same with `tools` in the shared block: segment A, the tools as the chat template shows them, and the
rest in the agents' own messages. What a server says it took from the cache is held against the tokens that prompts have
in common, counted apart, and every answer against that of the same request under a salt of its own, for which nothing
is cached.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from eval.data_files import json_of, text_of
from eval.figures import Figure, Report
from eval.served import served
from eval.workload import make_parser, parse, run, settings
from kvcomm import Engine
from kvcomm.lab.timings import TakeTokens

AGENTS = ("ABD", "ACE", "ABE")
QUESTIONS = (
    "Which of your tools would you use first, and why?",
    "What must you never do?",
    "List the arguments of your first tool.",
)
SECOND = "And then?"
MAX_CHARS = 2400
"""Of one segment: all three agents and their conversations fit a model with a window of 8,192 tokens."""


Tools = Sequence[Mapping[str, Any]]


class Answer(NamedTuple):
    """What came back; calls as JSON."""

    text: str
    usage: Mapping[str, Any]

    @property
    def cached(self) -> int:
        """Tokens that the server took from the cache."""
        return int(self.usage["cached_prefix_tokens"])


class Client:
    """Asks one server for short greedy answers behind segments."""

    def __init__(self, port: int, model: str, max_tokens: int) -> None:
        self._port = port
        self._fixed = {"model": model, "max_tokens": max_tokens, "temperature": 0}

    def ask(
        self, segments: Sequence[Mapping[str, str]], messages: Sequence[Mapping[str, str]], **fields: Any
    ) -> Answer:
        """The answer to a conversation; raises OSError when there is none."""
        body = {**self._fixed, "segments": segments, "messages": messages, **fields}
        answer = self._post("/v1/chat/completions", body)
        message = answer["choices"][0]["message"]
        calls = [each["function"] for each in message["tool_calls"] or ()]  # their ids are random
        return Answer(message["content"] or json.dumps(calls), answer["usage"])

    def tokens(self, messages: Sequence[Mapping[str, str]], tools: Tools) -> list[int]:
        """The tokens of a prompt without segments; raises as `ask`."""
        return list(self._post("/tokenize", {"messages": messages, "tools": tools})["tokens"])

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        connection = HTTPConnection("127.0.0.1", self._port)
        try:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            answer: dict[str, Any] = json.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise OSError(f"the server answered {response.status}: {answer['error']['message']}")
        return answer


class Table:
    """Asks for every row of the table, once cached and once cold."""

    def __init__(self, client: Client, texts: Mapping[str, str]) -> None:
        self.client = client
        self.texts = texts
        self.num_rows = self.num_wrong = 0

    def row(self, agent: str, messages: Sequence[Mapping[str, str]], **fields: Any) -> Answer:
        """An agent's answer; counted as wrong when it is not what a cold cache gives."""
        segments = [{"id": each, "content": self.texts[each]} for each in agent]
        answer = self.client.ask(segments, messages, **fields)
        self.num_rows += 1
        cold = self.client.ask(segments, messages, cache_salt=f"row {self.num_rows}", **fields)
        self.num_wrong += (answer.text, cold.cached) != (cold.text, 0)
        return answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = make_parser("segments", "What three agents with shared segments and a second turn find cached.")
    parser.add_argument("--agents", type=Path, required=True, metavar="FOLDER", help="prompts and tool schemas")
    parser.add_argument("--max-chars", type=int, default=MAX_CHARS, metavar="N", help="of one segment [%(default)s]")
    parser.add_argument("--max-tokens", type=int, default=24, metavar="N", help="of an answer [%(default)s]")
    return run(parse(parser, arguments, repeats=1, quick_repeats=1), measure)


def measure(engine: Engine, take: TakeTokens, options: Namespace) -> Report:
    """All figures of an engine."""
    texts = segment_texts(options.agents, options.max_chars)
    sizes = {name: len(engine.segment(text).token_ids) for name, text in texts.items()}
    with served(engine) as (port, model):
        table = Table(Client(port, model, options.max_tokens), texts)
        first, second, third = (table.row(agent, [_user(ask)]) for agent, ask in zip(AGENTS, QUESTIONS, strict=True))
        history = [_user(QUESTIONS[0]), {"role": "assistant", "content": first.text}]
        again = table.row(AGENTS[0], [*history, _user(SECOND)])
        other = table.row(AGENTS[0], [_user(SECOND)])
        with_tools = tool_figures(engine, table, options)
    wanted = [sizes["A"], sizes["A"] + sizes["B"], sum(sizes[name] for name in AGENTS[0])]
    said = {"agent_2": second.cached, "agent_3": third.cached, "new_conversation": _of_segments(other, wanted[2])}
    num_wrong = table.num_wrong + sum(found != goal for found, goal in zip(said.values(), wanted, strict=True))
    num_wrong += sum(figure.goal != f"= {figure.value}" for figure in with_tools)
    turn = first.usage["prompt_tokens"]
    num_wrong += again.cached < turn
    figures = [
        Figure("agent_1_cached_prefix_tokens", first.cached, "tokens", None, "= 0"),
        *(
            Figure(f"{name}_cached_prefix_tokens", found, "tokens", None, f"= {goal}")
            for (name, found), goal in zip(said.items(), wanted, strict=True)
        ),
        Figure("second_turn_cached_segment_tokens", _of_segments(again, wanted[2]), "tokens", None, f"= {wanted[2]}"),
        Figure("second_turn_cached_prefix_tokens", again.cached, "tokens", None, f">= {turn}"),
        *with_tools,
        Figure("segment_hits_wrong", num_wrong, "requests", None, "= 0"),
    ]
    return Report("segments", figures, settings(engine, options, agents=options.agents.name, segment_tokens=sizes))


def segment_texts(folder: Path, max_chars: int) -> dict[str, str]:
    """A: a system prompt; B and C: tool schemas; D and E: what an agent is told to do. No two begin alike.

    Raises:
        InvalidRequest: a file is missing, or not what it should be.
    """
    prompts = folder / "prompts"
    bfcl, github = json_of(folder / "bfcl_tool_schemas.json"), json_of(folder / "github_mcp_tools.json")
    texts = {
        "A": text_of(prompts / "openhands_codeact_system_prompt.j2"),
        "B": f"Tools:\n{json.dumps(bfcl['gorilla_file_system'], indent=1)}",
        "C": f"GitHub tools:\n{json.dumps(github, indent=1)}",
        "D": text_of(prompts / "taubench_retail_policy.md"),
        "E": text_of(prompts / "openhands_swe_task.j2"),
    }
    return {name: f"{text[:max_chars]}\n" for name, text in texts.items()}


def tool_figures(engine: Engine, table: Table, options: Namespace) -> list[Figure]:
    """What is cached for each agent whose tools are in `tools`: as much as it has in common with one before it."""
    texts, tools = table.texts, tools_of(options.agents, options.max_chars)
    shared = list(engine.segment(texts["A"]).token_ids)
    before: list[list[int]] = [shared]
    figures = []
    for number, (agent, ask) in enumerate(zip(AGENTS, QUESTIONS, strict=True), 1):
        _, shown, own = agent
        messages = [_user(texts[own] + ask)]
        answer = table.row("A", messages, tools=tools[shown])
        prompt = shared + table.client.tokens(messages, tools[shown])
        goal = max(_num_common(prompt, other) for other in before)
        before.append(prompt)
        name = f"tools_agent_{number}_cached_prefix_tokens"
        figures.append(Figure(name, answer.cached, "tokens", None, f"= {goal}"))
    return figures


def tools_of(folder: Path, max_chars: int) -> dict[str, list[dict[str, Any]]]:
    """The tools that segments B and C speak of, as OpenAI has them; as many as there is room for."""
    bfcl, github = json_of(folder / "bfcl_tool_schemas.json"), json_of(folder / "github_mcp_tools.json")
    return {
        name: _within([_tool(each) for each in found], max_chars)
        for name, found in (("B", bfcl["gorilla_file_system"]), ("C", github))
    }


def _tool(found: Mapping[str, Any]) -> dict[str, Any]:
    schema = found.get("parameters", found.get("inputSchema", {}))
    function = {"name": found["name"], "description": found.get("description", ""), "parameters": schema}
    return {"type": "function", "function": function}


def _within(tools: list[dict[str, Any]], max_chars: int) -> list[dict[str, Any]]:
    """The first tools, at least one."""
    num_chars = list(accumulate(len(json.dumps(tool)) for tool in tools))
    return tools[: max(1, sum(each <= max_chars for each in num_chars))]


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens with which both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _of_segments(answer: Answer, num_tokens: int) -> int:
    """Cached tokens that belong to the segments; a conversation behind them may be cached as well."""
    return min(answer.cached, num_tokens)


if __name__ == "__main__":
    sys.exit(main())
