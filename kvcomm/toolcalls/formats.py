"""The ways in which models write calls: how each is read, and how a call looks in it.

How a model writes is found out from its chat template, by letting it render a call; `--tool-parser` names another one.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvcomm.toolcalls import mistral, plain_json, pythonic, tagged
from kvcomm.toolcalls.writer import AnswerWriter, CallParser, NewId, new_id

Tools = Sequence[Mapping[str, Any]]
"""As OpenAI has them: `{"type": "function", "function": {"name": ..., "parameters": ...}}`."""

MISTRAL_ID = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@dataclass(frozen=True)
class Shape:
    """How calls look: `begin NAME middle ARGUMENTS`, `between` before each further one, `end`.

    Attributes:
        between: None: there can only be one.
    """

    begin: str
    middle: str
    between: str | None
    end: str

    def written(self, calls: Sequence[tuple[str, str]]) -> str:
        """Calls, each a name and JSON text of arguments."""
        between = self.end + self.begin if self.between is None else self.between
        return self.begin + between.join(f"{name}{self.middle}{arguments}" for name, arguments in calls) + self.end


@dataclass(frozen=True)
class Format:
    """A way of writing calls.

    Attributes:
        markers: what may be special tokens, which the parser has to see.
        trigger: the text with which calls begin in the middle of an answer; None: they only stand at its beginning.
        shape: how a call looks, where a chat template does not show it; arguments are JSON.
        make: a parser for an answer with these tools.
        new_id: an id of a call, as chat templates of this format take it.
    """

    name: str
    markers: tuple[str, ...]
    trigger: str | None
    shape: Shape
    make: Callable[[AnswerWriter, Tools], CallParser]
    new_id: NewId = new_id


def names_of(tools: Tools) -> frozenset[str]:
    """The tools' names."""
    return frozenset(tool["function"]["name"] for tool in tools)


def parameters_of(tools: Tools) -> dict[str, tuple[str, ...]]:
    """The tools' names, and the names of their parameters in order."""
    return {tool["function"]["name"]: tuple(properties_of(tool["function"].get("parameters"))) for tool in tools}


def properties_of(schema: Any) -> Mapping[str, Any]:
    """The properties of an object's schema; nothing where it has none."""
    found = schema.get("properties") if isinstance(schema, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _mistral_id() -> str:
    return "".join(secrets.choice(MISTRAL_ID) for _ in range(9))


HERMES = Format(
    name="hermes",
    markers=(tagged.OPEN, tagged.CLOSE),
    trigger=tagged.OPEN,
    shape=Shape(
        '<tool_call>\n{"name": "',
        '", "arguments": ',
        '}\n</tool_call>\n<tool_call>\n{"name": "',
        "}\n</tool_call>",
    ),
    make=lambda writer, _: tagged.TaggedParser(writer),
)
LLAMA3_JSON = Format(
    name="llama3_json",
    markers=(plain_json.MARK,),
    trigger=None,
    shape=Shape('{"name": "', '", "parameters": ', '}; {"name": "', "}"),
    make=lambda writer, tools: plain_json.PlainJsonParser(writer, names_of(tools)),
)
MISTRAL = Format(
    name="mistral",
    markers=(mistral.MARK, "[ARGS]", "[CALL_ID]"),
    trigger=mistral.MARK,
    shape=Shape('[TOOL_CALLS] [{"name": "', '", "arguments": ', '}, {"name": "', "}]"),
    make=lambda writer, _: mistral.MistralParser(writer),
    new_id=_mistral_id,
)
PYTHONIC = Format(
    name="pythonic",
    markers=(pythonic.START, pythonic.END),
    trigger=None,
    shape=Shape("[", "(", "), ", ")]"),
    make=lambda writer, tools: pythonic.PythonicParser(writer, parameters_of(tools)),
)
FORMATS: Mapping[str, Format] = {each.name: each for each in (HERMES, LLAMA3_JSON, MISTRAL, PYTHONIC)}
"""By the names that `--tool-parser` takes."""


def format_of(written: str) -> Format | None:
    """The format of a rendered call, its name and arguments included; None: nobody knows it."""
    if tagged.OPEN in written and '"name"' in written:
        return HERMES
    if mistral.MARK in written:
        return MISTRAL
    if '{"name": "' in written or plain_json.MARK in written:
        return LLAMA3_JSON
    return PYTHONIC if "([" not in written and "[" in written and "(" in written else None
