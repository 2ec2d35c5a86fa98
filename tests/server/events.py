"""Reading server-sent events in tests."""

from __future__ import annotations

import json
from typing import Any

DONE = "[DONE]"


def events_of(text: str) -> list[Any]:
    """The data of every event: JSON values, and the end mark as it is."""
    lines = [line for line in text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines), lines
    data = [line.removeprefix("data: ") for line in lines]
    return [each if each == DONE else json.loads(each) for each in data]
