"""Starting confined processes, following them to their end or their limits, and ending what is left of them."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple, Self

from eval.sandbox.system_calls import filter_program
from eval.sandbox.ways import Isolation

MAX_OUTPUT = 10_000
"""Bytes of a process's output that are kept, from its end."""
_MAX_REPORT = 1 << 16
_LAST_WORDS_S = 1.0
"""How long a process that closed its end of a pipe is given to be seen ending."""


class Limits(NamedTuple):
    """Of one program: seconds by the clock and of CPU, bytes of memory and of any file."""

    seconds: float = 10.0
    cpu_s: int = 10
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20


class Tests(NamedTuple):
    """What a program is judged by. All of it is trusted: it comes from the task.

    Attributes:
        beginning: Python that the tests may use, run before them; names of the program are not known there.
        function: the program's function that they call; the only name of the program's.
        code: Python that raises where the program is wrong.
    """

    beginning: str
    function: str
    code: str


class Verdict(NamedTuple):
    """How a program ended.

    Attributes:
        passed: it ran to its end without an error; of a judged program, its tests did.
        reason: "passed", "timeout", or why not, in one line.
        output: the end of what it wrote.
        said: the end of what its tests wrote; empty without tests.
    """

    passed: bool
    reason: str
    output: str
    said: str = ""


def run_program(program: str, limits: Limits, way: Isolation) -> Verdict:
    """Run a program to its end, or to its limits.

    `passed` is what the program says of itself: it may claim its end earlier. Whether it is right is for `judge`.

    Args:
        way: how it is kept apart.
    """
    deadline = time.monotonic() + limits.seconds
    with _Pipe() as report:
        with _Confined(way, "program.run", {"program": program, "report": report.writing}, limits) as process:
            report.close_writing()
            is_late = not _follow([process], process, deadline)
        said = report.read()
    if is_late:
        return Verdict(False, "timeout", process.output)
    if said and process.status == 0:
        return Verdict(True, "passed", process.output)
    return Verdict(False, process.last_line if process.status else process.ending, process.output)


def judge(program: str, tests: Tests, limits: Limits, way: Isolation) -> Verdict:
    """Run a program's tests in another process than the program, which is only asked what its function gives.

    The limits are those of the program, and of the tests once more; the time is that of both together.

    Args:
        way: how both are kept apart, from each other too.
    """
    deadline = time.monotonic() + limits.seconds
    with ExitStack() as stack:
        calls, answers, report = (stack.enter_context(_Pipe()) for _ in range(3))
        asked = {"program": program, "calls": calls.reading, "answers": answers.writing}
        asking = {**tests._asdict(), "tests": tests.code}
        asking |= {"calls": calls.writing, "answers": answers.reading, "report": report.writing}
        program_process = stack.enter_context(_Confined(way, "program.serve", asked, limits))
        judge_process = stack.enter_context(_Confined(way, "judge.main", asking, limits))
        for pipe in (calls, answers, report):
            pipe.close_writing()
        calls.close_reading()
        answers.close_reading()
        is_late = not _follow([program_process, judge_process], judge_process, deadline)
        verdict = _parsed(report.read())
        if verdict is not None and verdict["has_ended"] and not is_late:
            _follow([program_process], program_process, min(deadline, time.monotonic() + _LAST_WORDS_S))
    output, said = program_process.output, judge_process.output
    if is_late:
        return Verdict(False, "timeout", output, said)
    if verdict is None:
        return Verdict(False, f"the tests {judge_process.ending}", output, said)
    if verdict["reason"] is None:
        return Verdict(True, "passed", output, said)
    ending = f": {program_process.ending}" if verdict["has_ended"] else ""
    return Verdict(False, f"{verdict['reason']}{ending}", output, said)


def _parsed(report: bytes) -> dict[str, Any] | None:
    """What the judge said; None: it did not come to its end."""
    try:
        return dict(json.loads(report))
    except ValueError:
        return None


class _Pipe:
    """Both ends of a pipe, closed at the latest when it is left."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        self._open = {self.reading, self.writing}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_reading()
        self.close_writing()

    def close_reading(self) -> None:
        """At most once."""
        self._close(self.reading)

    def close_writing(self) -> None:
        """At most once."""
        self._close(self.writing)

    def read(self) -> bytes:
        """What is in it."""
        os.set_blocking(self.reading, False)
        try:
            return os.read(self.reading, _MAX_REPORT)
        except BlockingIOError:
            return b""

    def _close(self, end: int) -> None:
        if end in self._open:
            self._open.remove(end)
            os.close(end)


class _Confined:
    """A process in the sandbox; whatever it has started ends when it is left.

    Attributes:
        status: how it ended, 128 and the signal if one ended it; None: it had to be ended.
    """

    def __init__(self, way: Isolation, function: str, given: Mapping[str, Any], limits: Limits) -> None:
        self.status: int | None = None
        self._kept = b""
        self._limits = limits
        message = json.dumps({**given, "limits": limits._asdict(), "uid": way.uid}).encode()
        self._folder = tempfile.TemporaryDirectory(prefix="kvcomm-sandbox-", ignore_cleanup_errors=True)
        with _file_of(message) as stdin, _file_of(filter_program()) as filter_fd:
            self._process = subprocess.Popen(
                way.command(function, self._folder.name, filter_fd),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={},
                cwd=self._folder.name,
                start_new_session=True,
                pass_fds=(filter_fd, *(value for value in given.values() if isinstance(value, int))),
            )
        assert self._process.stdout is not None
        self.stream = self._process.stdout
        os.set_blocking(self.stream.fileno(), False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.take()
        self.stream.close()
        self._folder.cleanup()

    @property
    def output(self) -> str:
        """The end of what it wrote."""
        return self._kept.decode(errors="replace")

    @property
    def last_line(self) -> str:
        """Of its output; how it ended if there is none."""
        lines = self.output.strip().splitlines()
        return lines[-1][:200] if lines else self.ending

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        if self.status == 128 + signal.SIGXCPU:
            return f"used up its {self._limits.cpu_s} s of processor time"
        return "was ended" if self.status is None else f"exit status {self.status}"

    def has_ended(self) -> bool:
        """Whether it has, by itself."""
        found = self._process.poll()
        if found is not None:
            self.status = found if found >= 0 else 128 - found
        return found is not None

    def take(self) -> bool:
        """Keep what it has written meanwhile; whether there may be more."""
        chunk = self.stream.read(1 << 16)
        self._kept = (self._kept + (chunk or b""))[-MAX_OUTPUT:]
        return chunk != b""


def _follow(processes: Sequence[_Confined], until: _Confined, deadline: float) -> bool:
    """Keep what processes write until one has ended; whether it did before the deadline."""
    with selectors.DefaultSelector() as selector:
        for each in processes:
            selector.register(each.stream, selectors.EVENT_READ, each)
        while not until.has_ended():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            for key, _ in selector.select(min(left, 0.01)):
                if not key.data.take():
                    selector.unregister(key.fileobj)
    return True


@contextmanager
def _file_of(content: bytes) -> Iterator[int]:
    """A file with some content that has no name, to be read from its beginning."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        file.seek(0)
        yield file.fileno()
