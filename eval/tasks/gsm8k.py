"""GSM8K (Cobbe et al., arXiv 2110.14168): word problems whose answer is a number."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal, InvalidOperation

from eval.sandbox import Isolation, isolation
from eval.tasks.program import beginning_of, code_of, printed_by
from eval.tasks.task import Row, Score, Source, Split

_NUMBER = re.compile(r"-?\$?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\$?\.\d+")
_STRICT = re.compile(r"answer:\s*(-?\$?[\d,]*\.?\d+)\s*(?:\.|$)", re.IGNORECASE | re.MULTILINE)


class Gsm8k:
    """Right by the last number of the answer; strictly right only on a line `Answer: NUMBER`."""

    name = "gsm8k"
    team = "gsm8k"
    source = Source(
        ("openai/gsm8k", "main"), "gsm8k", Split("test", "test"), Split("train", "train"), ("question", "answer")
    )
    readings = ("last number", "a line 'Answer: NUMBER'")
    first_texts = ()
    tools: Mapping[str, str] = {"programmer": "The program prints"}

    def __init__(self, *, unsafe: bool = False) -> None:
        """Make one.

        Args:
            unsafe: run programs even where the system cannot keep them apart.
        """
        self._unsafe = unsafe

    def isolation(self, agents: Collection[str]) -> Isolation | None:
        """Of the programmer's programs, if it is one of the agents."""
        return isolation(unsafe=self._unsafe) if self.tools.keys() & set(agents) else None

    def group(self, row: Row) -> str:
        """None."""
        return ""

    def arrange(self, rows: Sequence[Row]) -> list[Row]:
        """As they come."""
        return list(rows)

    def inputs(self, row: Row) -> dict[str, str]:
        """The problem."""
        return {"question": str(row["question"])}

    def use_tool(self, agent: str, answer: str, row: Row) -> str:
        """What the programmer's program prints."""
        return printed_by(beginning_of(code_of(answer)), isolation(unsafe=self._unsafe))

    def score(self, answer: str, first: Mapping[str, float], row: Row) -> Score:
        """See the class."""
        wanted = number(str(row["answer"]).rsplit("####", 1)[-1])
        found = last_number(answer)
        strict = _STRICT.findall(answer)
        return Score(
            "" if found is None else str(found),
            found is not None and found == wanted,
            bool(strict) and number(strict[-1]) == wanted,
        )


def last_number(text: str) -> Decimal | None:
    """The last number of a text; thousands may be set apart by commas, money by a dollar sign."""
    found = _NUMBER.findall(text)
    return number(found[-1]) if found else None


def number(text: str) -> Decimal | None:
    """A number as people write it: `1,200`, `$3.50`, ` 18 `; 18 equals 18.0."""
    try:
        return Decimal(re.sub(r"[,$\s]", "", text)).normalize() + 0
    except InvalidOperation:
        return None
