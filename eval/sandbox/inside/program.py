"""Runs a program that is not trusted: to its end, or as the place where its functions are called from elsewhere.

Nothing here has to be kept from the program, which may read and change all of it: the tests are in another process, and
what this one answers to a call is the program's answer, whoever in it wrote it.
"""

import builtins
import os
import sys
import types
from contextlib import suppress
from itertools import count

import confine
import wire


def run():
    """Run the program of stdin as the main module, and say so on the descriptor `report` when it came to its end."""
    given = confine.given()
    confine.confine(given["limits"], given["uid"])
    module = _main_module()
    try:
        exec(compile(given["program"], "<program>", "exec"), module.__dict__)
    finally:
        sys.stdout.flush()
    os.write(given["report"], b"ended")


def serve():
    """Run the program of stdin, then call its functions as the messages on the descriptor `calls` say."""
    given = confine.given()
    confine.confine(given["limits"], given["uid"])
    Service(given["calls"], given["answers"], given["program"]).run()


def _main_module():
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    return module


class Service:
    """Answers messages, each with the mark that it came with.

    Messages are {"mark", "do"} with "do" one of "load"; "call", with "function", "nodes", "args" and "kwargs"; "next",
    with "iterator"; "finish". Answers are {"mark", "nodes", "value"}, {"mark", "nodes", "raised"} or {"mark", "ended"}.
    """

    def __init__(self, calls, answers, program):
        self._calls = calls
        self._answers = answers
        self._program = program
        self._module = _main_module()
        self._iterators = {}
        self._numbers = count()

    def run(self):
        """Until the tests are over."""
        while True:
            try:
                message = wire.receive(self._calls)
            except wire.Closed:
                return
            answer = self._answer(message)
            with suppress(Exception):  # it may be anything by now
                sys.stdout.flush()
            mark = message["mark"]
            try:
                wire.send(self._answers, {"mark": mark, **answer})
            except wire.WireError as error:
                wire.send(self._answers, {"mark": mark, "ended": f"the result cannot be passed to the tests: {error}"})

    def _answer(self, message):
        known, before = [], []
        try:
            if message["do"] == "load":
                exec(compile(self._program, "<program>", "exec"), self._module.__dict__)
            if message["do"] in ("load", "finish"):
                return {"nodes": [], "value": None}
            if message["do"] == "next":
                return self._next(message["iterator"])
            before = message["nodes"]
            reader = wire.Reader(before)
            known = reader.objects
            args = [reader.value(each) for each in message["args"]]
            kwargs = {name: reader.value(each) for name, each in message["kwargs"].items()}
            return self._written(self._function(message["function"])(*args, **kwargs), known, before)
        except Exception as error:
            return self._raised(error, known, before)
        except BaseException as error:
            return {"ended": confine.last_line(error)}

    def _function(self, name):
        try:
            return self._module.__dict__[name]
        except KeyError:
            raise NameError(f"name {name!r} is not defined") from None

    def _next(self, number):
        for item in self._iterators[number]:
            return self._written([item], [], [])
        return self._written([], [], [])

    def _written(self, found, known, before):
        writer = wire.Writer(known, before, self._keep)
        try:
            value = writer.value(found)
            return {"nodes": writer.finish(), "value": value}
        except (wire.WireError, RecursionError) as error:
            return {"ended": f"the result cannot be passed to the tests: {error}"}

    def _raised(self, error, known, before):
        names = [each.__name__ for each in type(error).__mro__ if getattr(builtins, each.__name__, None) is each]
        writer = wire.Writer(known, before, self._keep)
        try:
            args = [writer.value(each) for each in error.args]
            nodes = writer.finish()
        except (wire.WireError, RecursionError):
            args, nodes = None, [None] * len(known)
        return {"nodes": nodes, "raised": {"types": names, "args": args, "line": confine.last_line(error)}}

    def _keep(self, iterator):
        number = next(self._numbers)
        self._iterators[number] = iterator
        return number
