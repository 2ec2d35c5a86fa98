"""Results as plain values: for `json.dumps` without help, and for people on a line or two.

What a result holds is told under the names of its fields, nested, in their order. Whole numbers stay whole, tuples
become lists, names of enumerations their values; a number that is not finite becomes None, because JSON has none such.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from numbers import Integral, Real
from typing import Any

import numpy as np

MAX_TEXT = 40
"""Characters of a text that are shown of it."""


class Plain:
    """A dataclass whose `to_dict` gives its fields."""

    def to_dict(self) -> dict[str, Any]:
        """Every field under its name, as JSON values; see `kvcomm.plain`."""
        return fields_of(self)


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass or a named tuple under their names, as JSON values."""
    names = [each.name for each in fields(value)] if is_dataclass(value) else value._fields
    return {name: plain(getattr(value, name)) for name in names}


def plain(value: Any) -> Any:
    """A value as JSON values.

    Raises:
        TypeError: it holds something that JSON has no form for.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value) or hasattr(value, "_fields"):
        return fields_of(value)
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray):
        return [plain(each) for each in value]
    raise TypeError(f"a {type(value).__name__} has no form in JSON: {value!r}")


def short(text: str, limit: int = MAX_TEXT) -> str:
    """A text in quotes, its end left out where it is long."""
    return repr(text if len(text) <= limit else f"{text[: limit - 1]}…")
