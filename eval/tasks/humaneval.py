"""HumanEval (Chen et al., arXiv 2107.03374): Python functions, judged by running their tests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from eval.sandbox import Limits, run_program
from eval.tasks.task import Row, Score, Source

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


class HumanEval:
    """Right when the tests pass; strictly right only if the answer is one block of code and nothing else."""

    name = "humaneval"
    team = "humaneval"
    source = Source(("openai/openai_humaneval", "openai_humaneval"), "humaneval", test="test", train="test")
    num_logprobs = None

    def __init__(self, limits: Limits | None = None) -> None:
        """Args:
        limits: of every program.
        """
        self._limits = limits or Limits()

    def group(self, row: Row) -> str:
        """None."""
        return ""

    def arrange(self, rows: Sequence[Row]) -> list[Row]:
        """As they come."""
        return list(rows)

    def inputs(self, row: Row) -> dict[str, str]:
        """Signature and docstring."""
        return {"question": str(row["prompt"]).rstrip()}

    def score(self, answer: str, first: Mapping[str, float], row: Row) -> Score:
        """See the class; `found` is the reason for which it failed, or "passed"."""
        verdict = run_program(program(answer, row), self._limits)
        whole = _BLOCK.fullmatch(answer.strip())
        return Score(verdict.reason, verdict.passed, verdict.passed and whole is not None)


def program(answer: str, row: Row) -> str:
    """What is run: the given beginning, the answer's code, and the tests.

    Code that does not define the function is taken for its body.
    """
    code, entry = code_of(answer), str(row["entry_point"])
    beginning = str(row["prompt"])
    if re.search(rf"^def {re.escape(entry)}\b", code, re.MULTILINE):
        # The beginning stays: its imports and helpers are used, and the later definition is the one that counts.
        beginning = f"{beginning}    pass\n\n\n"
    elif code and not code.startswith((" ", "\t")):
        code = "\n".join(f"    {line}" for line in code.splitlines())
    return f"{beginning}{code}\n\n{row['test']}\n\ncheck({entry})\n"


def code_of(answer: str) -> str:
    """The last block of code of an answer, or all of it; what stands behind an unfinished block is kept."""
    blocks = _BLOCK.findall(answer)
    return str(blocks[-1]).rstrip() if blocks else answer.rstrip()
