"""A grammar: what an answer may be, as a value that travels with the sampling settings.

It says what was asked for and is checked for form and size here; what it means token by token is the compiler's matter
(`grammar_compiler`). So a grammar needs no model, can be compared, hashed and kept, and nothing is compiled twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from kvcomm.engine.grammar_schema import prepared_schema
from kvcomm.errors import InvalidRequest
from kvcomm.plain import short
from kvcomm.values import items, text, truth_value

Kind = Literal["json_schema", "regex", "choice", "lark"]

MAX_REGEX, MAX_LARK = 16_384, 32_768
"""Characters of a regular expression, and of a grammar in Lark's notation."""

MAX_LARK_LINES = 1000
"""Rules refer to each other, and a chain of them is followed on the stack while it is compiled."""

MAX_CHOICES, MAX_CHOICE_LETTERS = 5000, 131_072
"""Texts to choose from, and their letters together."""


@dataclass(frozen=True)
class Grammar:
    """What an answer may be. Made by one of the class methods.

    Attributes:
        kind: how it was given.
        source: the JSON schema as it is enforced, the regular expression, or the text in Lark's notation.
    """

    kind: Kind
    source: str

    def __repr__(self) -> str:
        return f"Grammar({self.kind}, {short(self.source)})"

    @classmethod
    def json_schema(cls, schema: Mapping[str, object] | bool | str, *, strict: bool = True) -> Self:
        """JSON that validates against a schema, written as `json.dumps` writes it.

        Objects that list their properties get no others unless the schema asks for them, so that an answer ends.

        Args:
            schema: as a mapping, or as JSON text. Draft 2020-12 or earlier; references within the schema only.
            strict: refuse what cannot be enforced; False: leave it out, so that an answer need not validate.

        Raises:
            InvalidRequest: it is no schema, or too large. What cannot be enforced is found when it is compiled.
        """
        return cls("json_schema", prepared_schema(schema, strict=truth_value("strict", strict)))

    @classmethod
    def json_object(cls) -> Self:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Text that a regular expression matches as a whole. Rust's syntax: no look-around, no back references.

        Raises:
            InvalidRequest: it is no text, empty, or too long.
        """
        return cls("regex", _sized("regex", pattern, MAX_REGEX))

    @classmethod
    def choice(cls, choices: list[str] | tuple[str, ...]) -> Self:
        """One of several texts.

        Raises:
            InvalidRequest: there are none, too many, or one is empty or no text.
        """
        found = dict.fromkeys(text(f"choice[{at}]", each) for at, each in enumerate(items("choice", choices, "texts")))
        if not found or not all(found):
            raise InvalidRequest("choice must hold at least one text, and none of them empty")
        if len(found) > MAX_CHOICES or sum(map(len, found)) > MAX_CHOICE_LETTERS:
            raise InvalidRequest(
                f"choice holds {len(found)} texts of {sum(map(len, found))} letters; the most are {MAX_CHOICES} and "
                f"{MAX_CHOICE_LETTERS}"
            )
        # A terminal, not alternatives of a rule: those would be looked at one by one for every token.
        return cls("choice", "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(each) for each in found))

    @classmethod
    def lark(cls, grammar: str) -> Self:
        """A context-free grammar in llguidance's dialect of Lark; `%json {...}` embeds a schema, see `json_rule`.

        Control tokens come up only where the grammar names them, as `<|im_start|>` or by id, `<[2]>`.

        Raises:
            InvalidRequest: it is no text, empty, or too long.
        """
        source = _sized("grammar", grammar, MAX_LARK)
        num_lines = source.count("\n") + 1
        if num_lines > MAX_LARK_LINES:
            raise InvalidRequest(f"grammar has {num_lines} lines; the most are {MAX_LARK_LINES}")
        return cls("lark", source)

    @property
    def json_rule(self) -> str:
        """A grammar made by `json_schema`, to be put into one in Lark's notation where a value is wanted.

        Raises:
            InvalidRequest: it is another kind of grammar.
        """
        if self.kind != "json_schema":
            raise InvalidRequest(f"only a JSON schema can be embedded, not a grammar of kind {self.kind}")
        return f"%json {self.source}"


def _sized(name: str, value: object, most: int) -> str:
    source = text(name, value)
    if not source.strip():
        raise InvalidRequest(f"{name} is empty")
    if len(source) > most:
        raise InvalidRequest(f"{name} has {len(source)} characters; the most are {most}")
    return source
