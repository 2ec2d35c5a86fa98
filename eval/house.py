"""How much of kvcomm somebody must read to follow one request, and how large its pieces are.

    python -m eval.house [--model NAME] [--json]

One request that nothing is cached for is traced from `Engine.generate` to the logits behind its prompt, and one whose
text is moved: files of `kvcomm/` of which a function is called, their classes, their functions. What runs once per
engine is not counted: a request before has done that. Beside it lengths of files and functions, from the source.
"""

from __future__ import annotations

import ast
import sys
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import CodeType, FrameType
from typing import Any

import kvcomm
from eval.command import add_model, add_outputs, finish
from eval.figures import Figure, Report
from kvcomm import Engine, ReusePolicy, Rung

ROOT = Path(kvcomm.__file__).parent
APART = "integrations"
"""Folder that is not counted among the lines: it lives in other engines."""

LOGITS = "ModelRunner.forward"
"""What returns logits."""

GOALS = {"exact_files": "<= 24", "exact_classes": "<= 26", "max_file_lines": "<= 450"}


@dataclass
class Followed:
    """What a request has called up to its logits.

    Attributes:
        seen: code of kvcomm, since the request began.
        codes: of these, what was seen before logits came.
    """

    seen: set[CodeType] = field(default_factory=set)
    codes: set[CodeType] = field(default_factory=set)

    @property
    def files(self) -> list[str]:
        """Relative to the package, sorted."""
        return sorted({_file_of(code) for code in self.codes})

    @property
    def classes(self) -> list[tuple[str, str]]:
        """File and name, sorted."""
        owned = [(_file_of(code), code.co_qualname.split(".")) for code in self.codes]
        return sorted({(file, path[0]) for file, path in owned if len(path) > 1 and path[1] != "<locals>"})


class Tracer:
    """Notes what all threads that begin after it call, while a request is followed."""

    def __init__(self) -> None:
        self._followed: Followed | None = None

    def __enter__(self) -> Tracer:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def follow(self, request: Callable[[], object]) -> Followed:
        """What a request calls."""
        self._followed = followed = Followed()
        try:
            request()
        finally:
            self._followed = None
        return followed

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        followed, code = self._followed, frame.f_code
        if followed is None or not code.co_filename.startswith(str(ROOT)):
            return
        if event == "call":
            followed.seen.add(code)
        elif event == "return" and code.co_qualname == LOGITS:
            followed.codes |= followed.seen


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = _parser().parse_args(arguments)

    def measured() -> Report:
        with Tracer() as tracer, Engine.load(options.model, prior=None, progress=True) as engine:
            exact, approximate = _exact(engine, tracer), _approximate(engine, tracer)
            return Report("house", [*_requests(exact, approximate), *_lengths()], _config(options, exact))

    return finish(measured, options)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m eval.house", description="What it takes to follow a request.")
    add_model(parser)
    add_outputs(parser, "house")
    return parser


def _exact(engine: Engine, tracer: Tracer) -> Followed:
    """A prompt of which nothing is cached, under the exact policy."""
    engine.generate("What is done once has been done.", max_new_tokens=1)
    engine.wait_idle()
    return tracer.follow(lambda: engine.generate("Seven foxes jump over eleven lazy dogs.", max_new_tokens=1))


def _approximate(engine: Engine, tracer: Tracer) -> Followed:
    """A text that is known from behind another prefix, moved at a fixed rung."""
    text = engine.segment(" The tide came in at four and carried the boats away.", name="text")
    before = [engine.segment(f"You are the {name} of this house. Read:") for name in ("keeper", "owner", "guest")]
    policy = ReusePolicy(max_divergence=1.0, confidence=0.5, learn=False)
    rung = Rung("rotate")
    engine.generate([before[0], text], max_new_tokens=1)
    engine.generate([before[1], text], max_new_tokens=1, policy=policy, rung=rung)
    engine.wait_idle()
    return tracer.follow(lambda: engine.generate([before[2], text], max_new_tokens=1, policy=policy, rung=rung))


def _requests(exact: Followed, approximate: Followed) -> Iterator[Figure]:
    for name, followed in (("exact", exact), ("approximate", approximate)):
        yield _figure(f"{name}_files", len(followed.files), "files")
        yield _figure(f"{name}_classes", len(followed.classes), "classes")
        yield _figure(f"{name}_functions", len(followed.codes), "functions")


def _lengths() -> Iterator[Figure]:
    sources = {file: file.read_text() for file in sorted(ROOT.rglob("*.py"))}
    lines = {file: len(source.splitlines()) for file, source in sources.items()}
    functions = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for source in sources.values()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    yield _figure("max_file_lines", max(lines.values()), "lines")
    yield _figure("lines", sum(num for file, num in lines.items() if APART not in file.parts), "lines")
    yield _figure("files", len(lines), "files")
    yield _figure("median_file_lines", median(lines.values()), "lines")
    yield _figure("max_function_lines", max(functions), "lines")
    yield _figure("median_function_lines", median(functions), "lines")
    yield _figure("public_names", len(kvcomm.__all__), "names")


def _config(options: Namespace, exact: Followed) -> dict[str, Any]:
    """With it the files themselves: the way of an exact request, to be read from it."""
    return {
        "model": options.model,
        "exact_files": exact.files,
        "exact_classes": [":".join(c) for c in exact.classes],
    }


def _file_of(code: CodeType) -> str:
    return Path(code.co_filename).relative_to(ROOT).as_posix()


def _figure(name: str, value: float, unit: str) -> Figure:
    return Figure(name, value, unit, None, GOALS.get(name, ""))


if __name__ == "__main__":
    sys.exit(main())
