"""MMLU (Hendrycks et al., arXiv 2009.03300): questions of many subjects with four choices."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, zip_longest

from eval.tasks.task import Row, Score, Source, Split

LETTERS = ("A", "B", "C", "D")
NUM_SHOTS = 3
_LETTER = re.compile(r"\b([A-D])\b")


class Mmlu:
    """Right by the most probable of the four letters as first token; otherwise, by the first letter that the text says.

    The examples before a question are of its subject, from the dev split.
    """

    name = "mmlu"
    team = "mmlu"
    source = Source(
        ("cais/mmlu", "all"),
        "mmlu",
        Split("test", "test"),
        Split("test", "test"),
        ("subject", "question", "choices", "answer"),
    )
    shots = Split("dev", "dev")
    readings = ("most probable letter", "letter in the text")
    first_texts = LETTERS
    tools: Mapping[str, str] = {}

    def __init__(self, examples: Sequence[Row], num_shots: int = NUM_SHOTS) -> None:
        """Make one.

        Args:
            examples: rows of the dev split.
        """
        self._examples: dict[str, list[str]] = defaultdict(list)
        for row in examples:
            shown = self._examples[row["subject"]]
            if len(shown) < num_shots:
                shown.append(f"{_question(row)}\nAnswer: {LETTERS[int(row['answer'])]}")

    def isolation(self, agents: Collection[str]) -> None:
        """No programs are run."""

    def group(self, row: Row) -> str:
        """The subject."""
        return str(row["subject"])

    def arrange(self, rows: Sequence[Row]) -> list[Row]:
        """One of every subject, then the next of every subject."""
        subjects: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            subjects[row["subject"]].append(row)
        return [row for row in chain.from_iterable(zip_longest(*subjects.values())) if row is not None]

    def inputs(self, row: Row) -> dict[str, str]:
        """Examples and question."""
        examples = self._examples.get(row["subject"]) or [f"There are none for {row['subject']}."]
        return {"examples": "\n\n".join(examples), "question": _question(row)}

    def use_tool(self, agent: str, answer: str, row: Row) -> str:
        """There is none."""
        raise AssertionError(f"no tool works on the answer of {agent}")

    def score(self, answer: str, first: Mapping[str, float], row: Row) -> Score:
        """See the class."""
        wanted = LETTERS[int(row["answer"])]
        known = {letter: first[letter] for letter in LETTERS if letter in first}
        found = max(known, key=lambda letter: known[letter]) if known else ""
        said = _LETTER.findall(answer)
        return Score(found, found == wanted, bool(said) and said[0] == wanted)


def _question(row: Row) -> str:
    choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True)]
    return "\n".join([str(row["question"]), *choices])
