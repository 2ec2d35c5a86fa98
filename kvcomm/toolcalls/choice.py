"""From a choice of tools to a grammar: calls that have to come, of some tools only, with arguments that follow schemas.

A grammar is made only where something is asked for that the model could break: a call that is required, a tool that is
not allowed, a schema that is strict, calls that must not be several. Without that, answers are free. What a model
thinks before it answers is always free.

The grammars are in llguidance's dialect of Lark: control tokens by their id, `%json` for schemas, `[lazy]` for text
that ends where a call begins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvcomm.engine.grammar import Grammar
from kvcomm.errors import InvalidRequest
from kvcomm.toolcalls.formats import PYTHONIC, CallSyntax, Format, Tools, names_of, properties_of
from kvcomm.toolcalls.reader import ReasoningTags

MAX_CALLS = 16
"""In one answer that a grammar constrains."""

SHARED = ("$defs", "definitions")
"""Where a schema keeps what references in it name."""

NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class ToolChoice:
    """What an answer may call.

    Attributes:
        mode: "none" shows no tools; "required" wants a call.
        names: of the tools that may be called; None: all.
        is_parallel: whether there may be several calls.
    """

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] | None = None
    is_parallel: bool = True

    def allowed(self, tools: Tools) -> Tools:
        """The tools that may be called.

        Raises:
            InvalidRequest: it names a tool that is not there, or wants a call without tools.
        """
        if self.mode == "none":
            return ()
        unknown = next((name for name in self.names or () if name not in names_of(tools)), None)
        if unknown is not None:
            raise InvalidRequest(f"tool_choice names the function {unknown!r}, which is not among the tools")
        if self.mode == "required" and not tools:
            raise InvalidRequest("tool_choice asks for a call, but there are no tools")
        return [tool for tool in tools if self.names is None or tool["function"]["name"] in self.names]

    def is_free(self, tools: Tools, allowed: Tools) -> bool:
        """Whether nothing is asked for that the model could break; `allowed`: those of the tools that are."""
        if not tools or self.mode == "none":
            return True
        is_strict = any(tool["function"].get("strict") for tool in allowed)
        return self.mode == "auto" and self.is_parallel and len(allowed) == len(tools) and not is_strict


@dataclass(frozen=True)
class CallGrammars:
    """Makes grammars for one model.

    Attributes:
        shape: how its calls look.
        controls: special tokens by their text.
        tags: of its reasoning.
    """

    format: Format
    shape: CallSyntax
    controls: Mapping[str, int]
    tags: ReasoningTags | None = None

    def of(
        self, tools: Tools, choice: ToolChoice, *, is_reasoning: bool = False, reply: Grammar | None = None
    ) -> Grammar | None:
        """The grammar for answers with these tools; None: they are free.

        Args:
            is_reasoning: the answer begins in the middle of reasoning.
            reply: for answers that call nothing; None: these are free.

        Raises:
            InvalidRequest: a choice, or parameters of a strict tool, that cannot be followed; names what.
        """
        allowed = choice.allowed(tools)
        can_call = bool(tools) and choice.mode != "none"
        if not can_call and (reply is None or self.tags is None or reply.kind == "lark"):
            return reply
        if reply is None and choice.is_free(tools, allowed):
            return None
        rules = self._reasoning(is_reasoning)
        if can_call and reply is not None and self.shape.begin.startswith("{"):
            rules += self._objects(allowed)
        elif can_call:
            rules += self._calls(allowed, choice.is_parallel)
        if choice.mode == "required":
            rules.append("answer: calls")
        elif reply is not None:
            rules += ["answer: calls | reply" if can_call else "answer: reply", *_reply(reply)]
        else:
            rules += self._free(choice.is_parallel)
        return Grammar("lark", "\n".join(rules))  # its schemas have their limits; many tools may be long together

    def _reasoning(self, is_reasoning: bool) -> list[str]:
        if self.tags is None:
            return ["start: answer"]
        close = f"thought{self._ending(self.tags.close)}"
        if is_reasoning:
            return ["start: thought space answer", close, "space: /\\s*/", "TEXT: /(.|\\n)*/"]
        opened = self._literal(self.tags.open)
        return [f"start: ({opened} thought space)? answer", close, "space: /\\s*/", "TEXT: /(.|\\n)*/"]

    def _ending(self, marker: str) -> str:
        """The rest of a rule for text up to a marker, and with it."""
        return f": TEXT {self._literal(marker)}" if marker in self.controls else f"[lazy]: TEXT {_quoted(marker)}"

    def _calls(self, tools: Tools, is_parallel: bool) -> list[str]:
        begin, between, end = (
            self._literal(each or "") for each in (self.shape.begin, self.shape.between, self.shape.end)
        )
        more = f" ({between} call){{0,{MAX_CALLS - 1}}}" if is_parallel and self.shape.between is not None else ""
        rules = [f"calls: {begin} inner", f"inner: call{more} {end}"]
        rules.append("call: " + " | ".join(f"call_{at}" for at in range(len(tools))))
        for at, tool in enumerate(tools):
            rules += self._call(at, tool["function"])
        return rules

    def _objects(self, tools: Tools) -> list[str]:
        """Rules for one call that is nothing but an object: all of it as a schema, as what may stand instead is one.

        The lexer reads the longest piece that any rule knows, so a text such as '{"name": "' would hide other objects.
        """
        key = self.shape.middle.split('"')[3] if self.shape.middle.count('"') > 3 else "parameters"
        rules = ["calls: " + " | ".join(f"call_{at}" for at in range(len(tools)))]
        for at, tool in enumerate(tools):
            function = tool["function"]
            schema = dict(schema_of(function))
            shared = {name: schema.pop(name) for name in SHARED if name in schema}
            properties = {"name": {"const": function["name"]}, key: schema}
            whole = {"type": "object", "properties": properties, "required": list(properties), **shared}
            rules.append(f"call_{at}: {_json_rule(function['name'], whole, bool(function.get('strict')))}")
        return rules

    def _call(self, at: int, function: Mapping[str, Any]) -> list[str]:
        name = f"{_quoted(function['name'])} {self._literal(self.shape.middle)}"
        schema, is_strict = schema_of(function), bool(function.get("strict"))
        if self.format is PYTHONIC:
            return [f"call_{at}: {name} arguments_{at}_0_first", *_keywords(at, schema, is_strict=is_strict)]
        return [
            f"call_{at}: {name} arguments_{at}",
            f"arguments_{at}: {_json_rule(function['name'], schema, is_strict)}",
        ]

    def _free(self, is_parallel: bool) -> list[str]:
        """Rules for answers that may call something, or nothing."""
        text = ["TEXT: /(.|\\n)*/"] if self.tags is None else []
        trigger = self.format.trigger
        if trigger is None or not self.shape.begin.startswith(trigger):
            return ["answer: calls | OTHER?", f"OTHER: {_not_beginning(self.shape.begin)}"]
        rest = self._literal(self.shape.begin.removeprefix(trigger))
        blocks = f"block{{0,{MAX_CALLS}}} TEXT" if is_parallel else "block | TEXT"
        return [f"answer: {blocks}", f"block: opening {rest} inner", f"opening{self._ending(trigger)}", *text]

    def _literal(self, text: str) -> str:
        """A text in a rule, its control tokens as such."""
        if not text:
            return ""
        found = [re.escape(control) for control in sorted(self.controls, key=len, reverse=True) if control in text]
        pieces = re.split(f"({'|'.join(found)})", text) if found else [text]
        return " ".join(
            f"<[{self.controls[piece]}]>" if piece in self.controls else _quoted(piece) for piece in pieces if piece
        )


def schema_of(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a function's arguments: an object, and an empty one where nothing is said about it.

    Raises:
        InvalidRequest: it is something else.
    """
    given = function.get("parameters")
    schema: Mapping[str, Any] = NO_ARGUMENTS if given is None else given
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise InvalidRequest(f"the parameters of {function['name']!r} must be of type 'object', not {kind!r}")
    return {**schema, "type": "object"}


def _keywords(call: int, schema: Mapping[str, Any], *, is_strict: bool) -> list[str]:
    """Rules for arguments in Python's syntax, in the order of the schema: `_first` where none stands before."""
    properties = list(properties_of(schema).items())
    listed = schema.get("required")
    required = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    shared = {name: schema[name] for name in SHARED if name in schema}
    rules = []
    for at, (name, given) in enumerate(properties):
        value = {**given, **shared} if isinstance(given, Mapping) else given
        if not _IDENTIFIER.fullmatch(name):
            raise InvalidRequest(f"the parameter {name!r} cannot be a name in a call in Python's syntax")
        own = f"keyword_{call}_{at}"
        rules.append(f"{own}: {_quoted(name + '=')} {_json_rule(name, value, is_strict)}")
        for kind, comma in (("first", ""), ("more", '", " ')):
            skipping = "" if name in required else f" | arguments_{call}_{at + 1}_{kind}"
            rules.append(f"arguments_{call}_{at}_{kind}: {comma}{own} arguments_{call}_{at + 1}_more{skipping}")
    return [*rules, *(f'arguments_{call}_{len(properties)}_{kind}: ""' for kind in ("first", "more"))]


def _json_rule(name: str, schema: Any, is_strict: bool) -> str:
    """A part of a rule for JSON of a schema; where that is not strict, what cannot be followed is left out."""
    try:
        return Grammar.json_schema(schema, strict=is_strict).json_rule
    except InvalidRequest as error:
        raise InvalidRequest(f"{name!r} has parameters that cannot be followed: {error}") from error


def _reply(grammar: Grammar) -> list[str]:
    """Rules for an answer that calls nothing."""
    if grammar.kind == "json_schema":
        return [f"reply: {grammar.json_rule}"]
    if grammar.kind == "regex":
        return ["reply: REPLY", f"REPLY: /{grammar.source.replace('/', chr(92) + '/')}/"]
    if grammar.kind == "choice":
        return [grammar.source.replace("start:", "reply:", 1)]
    raise InvalidRequest("a grammar of your own cannot stand beside tools; leave one of them out")


def _not_beginning(begin: str) -> str:
    """A pattern for texts that do not look like calls."""
    return f"/\\s*[^\\s{re.escape(begin[0])}](.|\\n)*/"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
