"""Prompt templates: text with `{name}` and `{name@previous}` in it.

A template is a tuple of parts, static text and slots; no two static parts touch and none is empty. `{{` and
`}}` stand for single braces. What a name means (an input or an agent) is decided elsewhere; tokens and chat
formats too. `str.format` is not used: it would accept indexing, attributes, conversions and format
specifications, all of which are mistakes in a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvcomm.engine.chat_template import Static
from kvcomm.errors import TemplateError

NAME_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_SUFFIX = "previous"


@dataclass(frozen=True)
class Slot:
    """A place for an input or another agent's answer.

    Attributes:
        name: an input's or an agent's name.
        previous: the answer of the round before, written `{name@previous}`.
    """

    name: str
    previous: bool = False

    @property
    def placeholder(self) -> str:
        """The slot as the template's author wrote it, with braces."""
        return f"{{{self.label}}}"

    @property
    def label(self) -> str:
        """The slot as written, without braces."""
        return f"{self.name}@{_SUFFIX}" if self.previous else self.name


TemplatePart = Static | Slot


def parse_template(text: str, *, agent: str, field: str = "prompt") -> tuple[TemplatePart, ...]:
    """Split a template at its placeholders.

    Args:
        text: the template; may be empty.
        agent: whose template this is, for error messages only.
        field: which of the agent's templates, for error messages only.

    Raises:
        TemplateError: an unbalanced brace, an empty placeholder, a bad name or a suffix other than @previous.
            The message names agent, field, placeholder and line.
    """
    parts: list[TemplatePart] = []
    static: list[str] = []
    end = 0
    for token in _TOKEN.finditer(text):
        static.append(text[end : token.start()])
        end = token.end()
        if token.group(1) is not None:
            parts += [Static("".join(static)), _parse_slot(token, text, agent, field)]
            static = []
        elif len(token.group()) == 2:
            static.append(token.group()[0])
        else:
            raise _unbalanced(token, text, agent, field)
    parts.append(Static("".join([*static, text[end:]])))
    return tuple(part for part in parts if part != Static(""))


def escape(text: str) -> str:
    """Text in which every brace stands for itself when parsed as a template."""
    return text.replace("{", "{{").replace("}", "}}")


def slots_of(parts: Sequence[TemplatePart]) -> tuple[Slot, ...]:
    """The slots in order of appearance; a slot used twice appears twice."""
    return tuple(part for part in parts if isinstance(part, Slot))


def _parse_slot(token: re.Match[str], text: str, agent: str, field: str) -> Slot:
    name, at, suffix = token.group(1).partition("@")
    shown = _short(token.group())
    where = f"agent {agent!r}, {field}, line {_line(text, token.start())}"
    if not token.group(1).strip():
        raise TemplateError(f"{where}: empty placeholder {shown!r}; write {{{{}}}} for literal braces")
    if not NAME_PATTERN.fullmatch(name):
        raise TemplateError(
            f"{where}: placeholder {shown!r} has the bad name {_short(name)!r}; names are letters, digits, "
            "'_' and '-' and start with a letter or '_'; for literal braces write {{ and }}"
        )
    if at and suffix != _SUFFIX:
        raise TemplateError(
            f"{where}: placeholder {shown!r} ends in @{_short(suffix)}; only @{_SUFFIX} (the answer of the "
            "round before) exists"
        )
    return Slot(name, previous=bool(at))


def _unbalanced(token: re.Match[str], text: str, agent: str, field: str) -> TemplateError:
    line = _line(text, token.start())
    excerpt = _short(text[token.start() :])
    return TemplateError(
        f"agent {agent!r}, {field}, line {line}: unbalanced {token.group()!r} at {excerpt!r}; "
        f"for a literal brace write {token.group() * 2}"
    )


def _line(text: str, offset: int) -> int:
    return text.count("\n", 0, offset) + 1


def _short(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[:limit] + "..."
