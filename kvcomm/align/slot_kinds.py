"""Kinds of template slots: a row of slots that are numbered is a row of the same thing."""

from __future__ import annotations

import re
from functools import lru_cache

_NUMBERED = re.compile(r"(.*[^\W\d_])[\W_]*\d+", re.DOTALL)  # a letter, whatever is no letter, a number


@lru_cache(maxsize=4096)
def kind_of(slot: str) -> str:
    """What kind of slot a name stands for: "document_3" and "document 12" are both a "document".

    A name without a letter before its number is a kind of its own.
    """
    found = _NUMBERED.fullmatch(slot)
    return found.group(1) if found else slot
