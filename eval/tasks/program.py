"""Reading programs out of answers, and letting a team's tools run them."""

from __future__ import annotations

import ast
import re

from eval.sandbox import Limits, run_program

BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
TOOL_LIMITS = Limits(seconds=5.0, cpu_s=5)
MAX_RESULT = 200
"""Characters of a tool's result that are shown to those who read it."""


def code_of(answer: str) -> str:
    """The last block of code of an answer, or all of it; what stands behind an unfinished block is kept."""
    blocks = BLOCK.findall(answer)
    return str(blocks[-1]).rstrip() if blocks else answer.rstrip()


def beginning_of(text: str) -> str:
    """The longest beginning of a text, line by line, that is Python: people write a line of prose behind a program."""
    lines = text.splitlines()
    for end in range(len(lines), 0, -1):
        beginning = "\n".join(lines[:end])
        try:
            ast.parse(beginning)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return beginning
    return ""


def printed_by(code: str) -> str:
    """What a program prints, or why it ends without printing; never empty, and not long."""
    if not code.strip():
        return "nothing, for there is no program"
    verdict = run_program(code, TOOL_LIMITS)
    output = verdict.output.strip() if verdict.passed else verdict.reason
    return output[-MAX_RESULT:].strip() or "nothing"
