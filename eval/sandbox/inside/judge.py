"""Runs the tests of a program that runs elsewhere, and decides.

Everything in this process is ours or the task's: the beginning that the task gives, its tests, and functions of the
same names as the program's, each of which asks the program's process. From there come only plain values (see `wire`).
Every question carries a mark that nobody can know before; an answer with another mark, or out of shape, is a breach,
and with a breach the program has failed, whatever the tests make of it.
"""

import builtins
import json
import os
import secrets
import sys

import confine
import wire


class Breach(BaseException):
    """The program's process has ended, or has answered as no function can."""


class ProgramError(Exception):
    """The program raised an error that cannot be raised again here; the text is that error in one line."""


def main():
    """Judge the program at the descriptors of stdin's message, and report on the descriptor `report`."""
    given = confine.given()
    confine.confine(given["limits"], given["uid"])
    program = Program(given["calls"], given["answers"])
    reason = _judge(program, given)
    sys.stdout.flush()
    verdict = {"reason": program.breach or reason, "has_ended": program.has_ended}
    os.write(given["report"], json.dumps(verdict).encode())


def _judge(program, given):
    """Why the program failed; None: it did not."""
    names = {"__name__": "__tests__", "__builtins__": builtins}
    try:
        program.ask(do="load")
        exec(compile(given["beginning"], "<beginning>", "exec"), names)
        names[given["function"]] = _function(program, given["function"])
        exec(compile(given["tests"], "<tests>", "exec"), names)
        program.ask(do="finish")
    except BaseException as error:
        return str(error) if isinstance(error, ProgramError) else confine.last_line(error)
    return None


def _function(program, name):
    def function(*args, **kwargs):
        writer = wire.Writer()
        try:
            args = [writer.value(each) for each in args]
            kwargs = {name: writer.value(each) for name, each in kwargs.items()}
            nodes = writer.finish()
        except wire.WireError as error:
            raise program.broken(f"the tests cannot ask this of a program: {error}") from None
        return program.ask(writer.objects, do="call", function=name, nodes=nodes, args=args, kwargs=kwargs)

    function.__name__ = function.__qualname__ = name
    return function


class Program:
    """The other process.

    Attributes:
        breach: why the program has failed for good; None: it has not.
        has_ended: it closed its end, as a process does that ends.
    """

    def __init__(self, calls, answers):
        self.breach = None
        self.has_ended = False
        self._calls = calls
        self._answers = answers

    def ask(self, known=(), **message):
        """Send a message and give what its answer stands for, or raise what was raised there.

        Args:
            known: the objects of the message's nodes, into which is written what the program left in them.

        Raises:
            Breach: the program cannot be asked any more.
        """
        if self.breach is not None:
            raise Breach(self.breach)
        mark = secrets.token_hex(16)
        try:
            wire.send(self._calls, {"mark": mark, **message})
            answer = wire.receive(self._answers)
            if type(answer) is not dict or answer.get("mark") != mark:
                raise wire.WireError("it carries another mark")
            if "ended" in answer:
                raise self.broken(_line(answer["ended"]))
            reader = wire.Reader(answer.get("nodes"), known, self._iterator)
            if "raised" not in answer:
                return reader.value(answer.get("value"))
            error = _error(reader, answer["raised"])
        except wire.Closed:
            self.has_ended = True
            raise self.broken("the program ended before its tests") from None
        except wire.WireError as error:
            raise self.broken(f"the program answered what no function can: {error}") from None
        raise error

    def broken(self, reason):
        """Note that the program has failed for good; gives the error to be raised."""
        self.breach = self.breach or reason
        return Breach(self.breach)

    def _iterator(self, number):
        return _Iterator(self, number)


class _Iterator:
    """One that is in the program's process."""

    def __init__(self, program, number):
        self._program = program
        self._number = number

    def __iter__(self):
        return self

    def __next__(self):
        found = self._program.ask(do="next", iterator=self._number)
        if type(found) is not list or len(found) > 1:
            raise self._program.broken("the program answered what no iterator can")
        if not found:
            raise StopIteration
        return found[0]


def _error(reader, raised):
    """The error that was raised there: of the nearest built-in type, with its arguments if they can be passed."""
    if type(raised) is not dict or type(raised.get("types")) is not list:
        raise wire.WireError("an error is out of shape")
    found = [vars(builtins).get(name) for name in raised["types"] if type(name) is str]
    type_ = next((each for each in found if isinstance(each, type) and issubclass(each, Exception)), Exception)
    try:
        return type_(*[reader.value(each) for each in raised["args"]])
    except Exception:  # arguments that cannot be passed, or a type that wants others than its own `args`
        return ProgramError(_line(raised.get("line")))


def _line(text):
    shown = "".join(char for char in text[:200] if char.isprintable()) if type(text) is str else ""
    return shown or "an error without a text"
