"""What every hello shares: how it is called, and how it tells what works.

    INTERPRETER with_CLIENT.py URL MODEL [TOKENIZER]

A check is a function that takes a `Server` and raises where something is not as the client's documentation has it. Its
name begins with `tool` (a call, its result, a last answer) or `structured`. One JSON object a line on stdout tells how
a check went, and what it returned. These files run by themselves, in interpreters that have the client and know nothing
of kvcomm.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import NamedTuple

QUESTION = "What is the weather in Paris?"
RESULT = "sunny, 21 degrees"
LAST_WORDS = "It is sunny"
"""How the served model ends a conversation with a tool."""


class Server(NamedTuple):
    """Where to ask for what; `tokenizer`: a folder."""

    address: str
    model: str
    tokenizer: str

    @property
    def url(self) -> str:
        """The base that OpenAI's clients want."""
        return f"{self.address}/v1"


class Weather:
    """The tool, and what it was asked for."""

    def __init__(self) -> None:
        self.cities: list[str] = []

    def get_weather(self, city: str) -> str:
        """Get the weather of a city.

        Args:
            city: name of the city, as people write it
        """
        self.cities.append(city)
        return RESULT

    def require_called(self, answer: object = LAST_WORDS) -> None:
        """Make sure that it was called once, by the model, and that the answer came after that."""
        assert self.cities == ["Paris"], f"the tool was called for {self.cities}"
        assert LAST_WORDS in str(answer), f"the last answer is {answer!r}"


Check = Callable[[Server], object]


def main(*checks: Check) -> None:
    """Run the checks, each by itself."""
    server = Server(*sys.argv[1:4], *[""] * (4 - len(sys.argv)))
    for check in checks:
        error = found = None
        try:
            with redirect_stdout(sys.stderr):  # frameworks print what they do
                found = check(server)
        except Exception as caught:  # whatever it is, it is the finding
            traceback.print_exc()
            error = f"{type(caught).__name__}: {caught}"
        sys.stdout.write(json.dumps({"check": check.__name__, "error": error, "found": found}) + "\n")
        sys.stdout.flush()
