"""Three agents with tools that share texts pairwise: A+B+D, A+C+E and A+B+E behind role prompts of their own.

A are the rules of the house, the same in every round. B and C are the tools that the round's request needs, D and E
notes: pieces of other agents' prompts. They come again in other rounds, beside other texts. So B, D and E are wanted
behind texts that they have not been read behind, and the request is, too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from eval.data_files import json_of, rows_of, text_of
from eval.firstday.cutting import CountTokens, cut, pieces
from eval.firstday.data_folder import files, find
from kvcomm import Agent
from kvcomm.agents import Team
from kvcomm.errors import InvalidRequest

NUM_NOTES = 6
"""Notes of each kind, D and E."""
PROMPT_ENDINGS = (".md", ".txt", ".j2", ".yaml", ".yml")
RULES, TOOLS, NOTES, REQUEST = 0.25, 0.28, 0.18, 0.1
"""Shares of the longest prompt; what is left is for role and template."""

GROUPS = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "TwitterAPI": "posting_api",
    "VehicleControlAPI": "vehicle_control",
}
"""Group of tools by the class that a request is about."""


def _prompt(tools: str, notes: str, task: str) -> str:
    return f"Rules:\n{{rules}}\n\nTools:\n{{{tools}}}\n\nNotes:\n{{{notes}}}\n\nRequest: {{request}}\n\n{task}"


TEAM = Team(
    name="tools",
    description="Three agents with tools: a planner, an operator and a controller, who share texts pairwise.",
    agents=(
        Agent(
            "planner",
            system="You plan how a request of a customer is carried out. You call no tools yourself. Say in at most "
            "four short steps which of the tools are needed, in which order, and what each has to be given.",
            prompt=_prompt("tools_1", "notes_1", "Write the steps."),
        ),
        Agent(
            "operator",
            system="You carry out requests of customers by calling tools. Write the first call that is needed, with "
            "the name of the tool and its arguments, and nothing else. If something is missing, ask for it.",
            prompt=_prompt("tools_2", "notes_2", "Write the call."),
        ),
        Agent(
            "controller",
            system="You watch over the rules of the house. Say in two sentences which rule touches the request, "
            "whether the tools that are there suffice for it, and what must not happen.",
            prompt=_prompt("tools_1", "notes_2", "Give your judgement."),
        ),
    ),
)


def inputs(data: Path, max_tokens: int, count: CountTokens, num_rounds: int, seed: int) -> list[Mapping[str, str]]:
    """The texts of every round.

    Args:
        max_tokens: of the longest prompt.

    Raises:
        InvalidRequest: files are missing or cannot be read; names them.
    """
    folder = data / "agents"
    groups = _groups(json_of(find(folder, "bfcl_tool_schemas", (".json",))), int(TOOLS * max_tokens), count)
    requests = rows_of(find(folder, "bfcl_multi_turn", (".jsonl",)), _request, "a request as BFCL writes them")
    rules, first, second = _texts(folder / "prompts", max_tokens, count)
    drawn = random.Random(seed)
    if seed:
        drawn.shuffle(requests)
    found: list[Mapping[str, str]] = []
    for index in range(num_rounds):
        text, classes = requests[index % len(requests)]
        one, two = _tools(groups, classes, index)
        found.append(
            {
                "rules": rules,
                "tools_1": one,
                "tools_2": two,
                "notes_1": drawn.choice(first),
                "notes_2": drawn.choice(second),
                "request": cut(text, int(REQUEST * max_tokens), count),
            }
        )
    return found


def _request(row: Any) -> tuple[str, list[str]]:
    """What the user says first, and the classes that it is about."""
    return str(row["question"][0][0]["content"]), [str(each) for each in row["involved_classes"]]


def _groups(schemas: Any, max_tokens: int, count: CountTokens) -> dict[str, str]:
    """Group -> its first tools, whole ones, one a line."""
    if not isinstance(schemas, dict) or not schemas:
        raise InvalidRequest("bfcl_tool_schemas: needs an object, group of tools -> array of tools")
    found = {}
    for name, tools in schemas.items():
        lines = [json.dumps({key: tool[key] for key in ("name", "description", "parameters")}) for tool in tools]
        taken: list[str] = []
        for line in lines:
            if count("\n".join([*taken, line])) <= max_tokens:
                taken.append(line)
        found[str(name)] = "\n".join(taken) or cut(lines[0], max_tokens, count)
    return found


def _tools(groups: Mapping[str, str], classes: Sequence[str], index: int) -> tuple[str, str]:
    """The tools of a request's first class, and of its second one or, if it has one only, of another group."""
    names = sorted(groups)
    wanted = [GROUPS.get(each, each) for each in classes]
    known = [each for each in wanted if each in groups]
    others = [each for each in names if each not in known]
    chosen = [*known, *others[index % max(1, len(others)) :], *others]
    return groups[chosen[0]], groups[chosen[min(1, len(chosen) - 1)]]


def _texts(folder: Path, max_tokens: int, count: CountTokens) -> tuple[str, list[str], list[str]]:
    """The rules, and two kinds of notes: pieces of all prompts in turn."""
    prompts = files(folder, "", PROMPT_ENDINGS)
    if len(prompts) < 2:
        raise InvalidRequest(f"{folder}: needs two prompts at least ({', '.join(PROMPT_ENDINGS)}, plain or .gz)")
    prompts.sort(key=lambda file: ("policy" not in file.name, file.name))
    rules = cut(text_of(prompts[0]), int(RULES * max_tokens), count)
    cuts = [list(pieces(text_of(file), int(NOTES * max_tokens), count)) for file in prompts[1:]]
    in_turn = [piece for piece in dict.fromkeys(chain.from_iterable(zip_longest(*cuts))) if piece]
    if len(in_turn) < 2:
        raise InvalidRequest(f"{folder}: its prompts hold too little text for notes of two kinds")
    return rules, in_turn[0 : 2 * NUM_NOTES : 2], in_turn[1 : 2 * NUM_NOTES : 2]
