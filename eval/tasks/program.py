"""Reading programs out of answers, letting a team's tools run them, and saying what keeps them apart."""

from __future__ import annotations

import ast
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from eval.command import note
from eval.sandbox import NONE, Isolation, Limits, Verdict, run_program

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


def printed_by(code: str, way: Isolation) -> str:
    """What a program prints, or why it ends without printing; never empty, and not long.

    Args:
        way: how it is kept apart.
    """
    if not code.strip():
        return "nothing, for there is no program"
    verdict = run_program(code, TOOL_LIMITS, way)
    return told(verdict, verdict.output)


def told(verdict: Verdict, output: str) -> str:
    """What agents are told of a program: its output if it passed, or else why not; never empty, and not long."""
    return (output.strip() if verdict.passed else verdict.reason)[-MAX_RESULT:].strip() or "nothing"


def add_isolation_option(parser: ArgumentParser) -> None:
    """What to do where programs cannot be kept apart, and what keeping them apart means."""
    parser.add_argument(
        "--unsafe",
        action="store_true",
        help="run programs that the model wrote even where the system cannot keep them apart: with your rights, files "
        "and network",
    )
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.epilog = _ISOLATION


def note_isolation(way: Isolation) -> None:
    """Say how programs are kept apart; loudly, if they are not."""
    if way == NONE:
        note(
            "WARNING: --unsafe, and no isolation here: programs that the model wrote run with your rights, can read "
            "and change your files and use your network, and their verdicts can be forged."
        )
    else:
        note(f"programs are kept apart by {way}")


_ISOLATION = """\
Programs that the model wrote are run by bubblewrap where it is installed, else in namespaces of their own; where
neither works, the evaluation refuses to start without --unsafe. `python -m eval.sandbox` says what works here, and
why the rest does not. A program sees Python and the system's libraries, read-only, and an empty folder in memory: none
of your files, no environment, no other process, no network. It has no rights, starts no processes, and its memory,
processor time, files and output are limited. Tests run in a process of their own, which only asks what the program's
function gives.

Not promised: anything about faults of the kernel, or about what a program can learn from how long things take; with
--unsafe, where nothing works, nothing but the limits.
"""
