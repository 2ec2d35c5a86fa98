"""HumanEval (Chen et al., arXiv 2107.03374): Python functions, judged by running their tests."""

from __future__ import annotations

import ast
import doctest
import re
from collections.abc import Mapping, Sequence

from eval.sandbox import Limits, run_program
from eval.tasks.program import BLOCK, code_of, printed_by
from eval.tasks.task import Row, Score, Source, Split

_TRY_EXAMPLES = """
_right, _wrong = 0, ""
for _call, _wanted in {examples!r}:
    try:
        _got = repr(eval(_call)).strip()
    except Exception as _error:
        _got = repr(_error)
    if _got == _wanted:
        _right += 1
    elif not _wrong:
        _wrong = f"; {{_call}} gives {{_got[:60]}}, not {{_wanted[:60]}}"
print(f"{{_right}} of {num_examples} examples{{_wrong}}")
"""


class HumanEval:
    """Right when the tests pass; strictly right only if the answer is one block of code and nothing else."""

    name = "humaneval"
    team = "humaneval"
    source = Source(
        ("openai/openai_humaneval", "openai_humaneval"),
        "humaneval",
        Split("test", "humaneval"),
        Split("test", "humaneval"),
        ("prompt", "entry_point", "test"),
    )
    readings = ("tests pass", "tests pass, nothing but code")
    first_texts = ()
    tools: Mapping[str, str] = {"coder": "On the examples of the docstring it gets"}

    def __init__(self, limits: Limits | None = None) -> None:
        """Args:
        limits: of every program that is judged.
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

    def use_tool(self, agent: str, answer: str, row: Row) -> str:
        """How many examples of the docstring the code gets right, and the first one it does not."""
        examples = examples_of(str(row["prompt"]))
        trial = _TRY_EXAMPLES.format(examples=examples, num_examples=len(examples)) if examples else "print('no error')"
        return printed_by(f"{completed(answer, row)}\n{trial}")

    def score(self, answer: str, first: Mapping[str, float], row: Row) -> Score:
        """See the class; `found` is the reason for which it failed, or "passed"."""
        verdict = run_program(program(answer, row), self._limits)
        whole = BLOCK.fullmatch(answer.strip())
        return Score(verdict.reason, verdict.passed, verdict.passed and whole is not None)


def program(answer: str, row: Row) -> str:
    """What is run: the given beginning, the answer's code, and the tests."""
    return f"{completed(answer, row)}\n{row['test']}\n\ncheck({row['entry_point']})\n"


def completed(answer: str, row: Row) -> str:
    """The given beginning and the answer's code. Code that does not define the function is taken for its body."""
    code, entry = code_of(answer), str(row["entry_point"])
    beginning = str(row["prompt"])
    if re.search(rf"^def {re.escape(entry)}\b", code, re.MULTILINE):
        # The beginning stays: its imports and helpers are used, and the later definition is the one that counts.
        beginning = f"{beginning}    pass\n\n\n"
    elif code and not code.startswith((" ", "\t")):
        code = "\n".join(f"    {line}" for line in code.splitlines())
    return f"{beginning}{code}\n"


def examples_of(prompt: str) -> list[tuple[str, str]]:
    """The calls that the last function's docstring shows behind `>>>`, with what they give."""
    try:
        functions = [node for node in ast.parse(f"{prompt}    pass\n").body if isinstance(node, ast.FunctionDef)]
        found = doctest.DocTestParser().get_examples(ast.get_docstring(functions[-1]) or "") if functions else []
    except (SyntaxError, ValueError):  # not Python, or examples not written as doctest wants them
        return []
    return [(each.source.strip(), each.want.strip()) for each in found if each.want.strip()]
