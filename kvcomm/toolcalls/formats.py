"""The ways in which models write calls: how each is read, and how a call looks in it.

How a model writes is found out from its chat template, by letting it render a call; `--tool-parser` names another one.
"""

from __future__ import annotations

import json
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
class CallSyntax:
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


def _json(arguments: Mapping[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


@dataclass(frozen=True)
class Format:
    """A way of writing calls.

    Attributes:
        markers: what may be special tokens, which the parser has to see.
        trigger: the text with which calls begin in the middle of an answer; None: they only stand at its beginning.
        shape: how a call looks, where a chat template does not show it; arguments are JSON.
        declared: a response template for transformers' parser; then `make` is not used.
        make: a parser for an answer with these tools.
        new_id: an id of a call, as chat templates of this format take it.
        write_arguments: an object of arguments as calls of this format have it.
    """

    name: str
    markers: tuple[str, ...]
    trigger: str | None
    shape: CallSyntax
    make: Callable[[AnswerWriter, Tools], CallParser]
    new_id: NewId = new_id
    write_arguments: Callable[[Mapping[str, Any]], str] = _json
    declared: Mapping[str, Any] | None = None

    def written(self, calls: Sequence[tuple[str, Any]]) -> str:
        """Calls in an earlier answer; arguments are an object, or what a model wrote instead of one."""
        return self.shape.written([(name, self._arguments(each)) for name, each in calls])

    def _arguments(self, arguments: Any) -> str:
        return self.write_arguments(arguments) if isinstance(arguments, Mapping) else str(arguments)


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
    shape=CallSyntax(
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
    shape=CallSyntax('{"name": "', '", "parameters": ', '}; {"name": "', "}"),
    make=lambda writer, tools: plain_json.PlainJsonParser(writer, names_of(tools)),
)
MISTRAL = Format(
    name="mistral",
    markers=(mistral.MARK, "[ARGS]", "[CALL_ID]"),
    trigger=mistral.MARK,
    shape=CallSyntax('[TOOL_CALLS] [{"name": "', '", "arguments": ', '}, {"name": "', "}]"),
    make=lambda writer, _: mistral.MistralParser(writer),
    new_id=_mistral_id,
)
PYTHONIC = Format(
    name="pythonic",
    markers=(pythonic.START, pythonic.END),
    trigger=None,
    shape=CallSyntax("[", "(", "), ", ")]"),
    make=lambda writer, tools: pythonic.PythonicParser(writer, parameters_of(tools)),
    write_arguments=pythonic.written,
)
QWEN3_XML = Format(
    name="qwen3_xml",
    markers=(),
    trigger=tagged.OPEN,
    shape=HERMES.shape,
    make=HERMES.make,
    declared={
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "reasoning_content": {"open": "<think>", "close": "</think>"},
            "tool_calls": {
                "open_pattern": r"<tool_call>\s*<function=(?P<name>[^>\n]+)>",
                "close_pattern": r"</function>\s*</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>",
                },
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {},
        },
    },
)
FORMATS: Mapping[str, Format] = {each.name: each for each in (HERMES, LLAMA3_JSON, MISTRAL, PYTHONIC, QWEN3_XML)}
"""By the names that `--tool-parser` takes."""

TRIGGERS = tuple({each.trigger: None for each in FORMATS.values() if each.trigger is not None})
"""Texts that begin calls wherever they stand."""


def format_of(written: str) -> Format | None:
    """The format of a rendered call, its name and arguments included; None: nobody knows it."""
    if tagged.OPEN in written:
        return QWEN3_XML if "<function=" in written else HERMES if '"name"' in written else None
    if mistral.MARK in written:
        return MISTRAL
    if '{"name": "' in written or plain_json.MARK in written:
        return LLAMA3_JSON
    return PYTHONIC if written.startswith("[") and "(" in written else None
