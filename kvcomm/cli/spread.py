"""Options that go together, stated once: a dataclass of them is one parameter of every command that takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, TypeVar, get_type_hints

R = TypeVar("R")


def spread(command: Callable[..., R]) -> Callable[..., R]:
    """A command as typer takes it: each field of a parameter that is a dataclass is an option of its own.

    Fields are annotated like parameters of commands. The options stand where the parameter stands, and the command
    gets the dataclass, made of what was given.

    Raises:
        TypeError: a field has no default, or the default is made by a function: typer would not see it.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    options: list[Parameter] = []
    for name, parameter in signature(command).parameters.items():
        if name in groups:
            options += _options(groups[name])
        else:
            options.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @wraps(command)
    def spread_out(**given: Any) -> R:
        for name, group in groups.items():
            given[name] = group(**{option.name: given.pop(option.name) for option in _options(group)})
        return command(**given)

    spread_out.__signature__ = Signature(options)  # type: ignore[attr-defined]  # what `inspect.signature` looks for
    spread_out.__annotations__ = {option.name: option.annotation for option in options}
    return spread_out


def _options(group: Any) -> Iterator[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        if field.default is MISSING:
            raise TypeError(f"option {field.name!r} of {group.__name__} needs a default value")
        yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
