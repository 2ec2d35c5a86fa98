"""HumanEval (Chen et al., arXiv 2107.03374): Python functions, judged by running their tests.

The tests run where the answer's code is not (`eval.sandbox.judge`). They know the task's own beginning, with its
imports and helpers, and of the answer only the function that was asked for.
"""

from __future__ import annotations

import ast
import doctest
import re
from collections.abc import Collection, Mapping, Sequence

from eval.sandbox import Isolation, Limits, Tests, Verdict, isolation, judge
from eval.tasks.program import BLOCK, TOOL_LIMITS, code_of, told
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

    def __init__(self, limits: Limits | None = None, *, unsafe: bool = False) -> None:
        """Make one.

        Args:
            limits: of every program that is judged.
            unsafe: run programs even where the system cannot keep them apart.
        """
        self._limits = limits or Limits()
        self._unsafe = unsafe

    def isolation(self, agents: Collection[str]) -> Isolation:
        """Of all programs."""
        return isolation(unsafe=self._unsafe)

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
        verdict = self._judged(answer, row, trial, TOOL_LIMITS)
        return told(verdict, verdict.said)

    def score(self, answer: str, first: Mapping[str, float], row: Row) -> Score:
        """See the class; `found` is the reason for which it failed, or "passed"."""
        verdict = self._judged(answer, row, f"{row['test']}\n\ncheck({row['entry_point']})\n", self._limits)
        whole = BLOCK.fullmatch(answer.strip())
        return Score(verdict.reason, verdict.passed, verdict.passed and whole is not None)

    def _judged(self, answer: str, row: Row, code: str, limits: Limits) -> Verdict:
        """Let some code ask the function of an answer."""
        tests = Tests(beginning(row), str(row["entry_point"]), code)
        return judge(completed(answer, row), tests, limits, isolation(unsafe=self._unsafe))


def beginning(row: Row) -> str:
    """The given beginning as Python: imports, helpers, and the function that is asked for, without a body."""
    return f"{row['prompt'].rstrip()}\n    pass\n"


def completed(answer: str, row: Row) -> str:
    """The given beginning and the answer's code. Code that does not define the function is taken for its body."""
    code, entry = code_of(answer), str(row["entry_point"])
    if re.search(rf"^def {re.escape(entry)}\b", code, re.MULTILINE):
        # The beginning stays: its imports and helpers are used, and the later definition is the one that counts.
        return f"{beginning(row)}\n\n{code}\n"
    if code.strip() and not code.lstrip("\r\n").startswith((" ", "\t")):
        code = "\n".join(f"    {line}" for line in code.splitlines())
    return f"{row['prompt']}{code}\n"


def examples_of(prompt: str) -> list[tuple[str, str]]:
    """The calls that the last function's docstring shows behind `>>>`, with what they give."""
    try:
        functions = [node for node in ast.parse(f"{prompt}    pass\n").body if isinstance(node, ast.FunctionDef)]
        found = doctest.DocTestParser().get_examples(ast.get_docstring(functions[-1]) or "") if functions else []
    except (SyntaxError, ValueError):  # not Python, or examples not written as doctest wants them
        return []
    return [(each.source.strip(), each.want.strip()) for each in found if each.want.strip()]
