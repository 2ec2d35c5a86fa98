"""Numbers and texts as callers give them, checked and brought to Python's own types.

Every setting that a caller can get wrong goes through here, so that a value of the wrong type is refused where it is
given and never inside a step that others share. Whole numbers serve as floats, NumPy's scalars as Python's; truth
values are not numbers, and a float is not a whole number, however round it is.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Collection, Mapping

import numpy as np

from kvcomm.errors import InvalidRequest

_MAX_SHOWN = 80


def whole_number(name: str, value: object) -> int:
    """`value` as an int.

    Raises:
        InvalidRequest: it is no whole number; names it.
    """
    if not isinstance(value, bool | np.bool_ | float):
        try:
            return operator.index(value)  # type: ignore[arg-type]  # the call itself is the check
        except TypeError:
            pass
    raise InvalidRequest(f"{name} must be a whole number, not {told(value)}")


def real_number(name: str, value: object) -> float:
    """`value` as a float; it may be infinite or NaN, which is the caller's to judge.

    Raises:
        InvalidRequest: it is no number, or too large for a float; names it.
    """
    if type(value) is not bool and isinstance(value, numbers.Real):
        try:
            return float(value)
        except (OverflowError, ValueError, TypeError):
            pass
    raise InvalidRequest(f"{name} must be a number, not {told(value)}")


def truth_value(name: str, value: object) -> bool:
    """`value` as a bool.

    Raises:
        InvalidRequest: it is neither true nor false; names it.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise InvalidRequest(f"{name} must be True or False, not {told(value)}")


def items(name: str, value: object, wanted: str) -> tuple[object, ...]:
    """The items of a list-like `value`, in order: a tuple, list, range or one-dimensional array.

    Args:
        wanted: what it should be, for the error.

    Raises:
        InvalidRequest: it is none of these; names it.
    """
    is_ordered = isinstance(value, Collection) and not isinstance(
        value, str | bytes | bytearray | Mapping | set | frozenset
    )
    if is_ordered and getattr(value, "ndim", 1) == 1:
        return tuple(value)  # type: ignore[arg-type]  # a Collection is iterable
    raise InvalidRequest(f"{name} must be {wanted}, not {told(value)}")


def text(name: str, value: object) -> str:
    """`value` as text that can be encoded.

    Raises:
        InvalidRequest: it is no str, or holds half of a surrogate pair; names it.
    """
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be text, not {told(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} holds the lone surrogate {value[error.start]!r} at character {error.start}, which no text can "
            "have; decode its source with errors='replace'"
        ) from None
    return str(value)


def shown(value: object) -> str:
    """A value for an error message, in a few words whatever it is."""
    try:
        whole = repr(value)
    except Exception as error:  # an object that cannot be shown is still only a wrong value
        return f"an object whose repr raises {type(error).__name__}"
    return whole if len(whole) <= _MAX_SHOWN else whole[:_MAX_SHOWN] + "..."


def told(value: object) -> str:
    """A value of the wrong type for an error message: what it is and of which type."""
    return f"{shown(value)} ({type(value).__name__})"
