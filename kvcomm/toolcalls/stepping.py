"""What the parsers of calls have in common: text is kept until it can be read, then read step by step."""

from __future__ import annotations

from abc import ABC, abstractmethod

from kvcomm.toolcalls.json_call import JsonCall
from kvcomm.toolcalls.writer import AnswerWriter


class SteppingParser(ABC):
    """A `CallParser` that is in one of a few states, each of which reads what it can at the front of the buffer."""

    def __init__(self, writer: AnswerWriter) -> None:
        self._writer = writer
        self._buffer = ""  # what no state has read yet
        self._before = ""  # what was read since a mark and would be text if no call came

    def feed(self, text: str) -> None:
        """See `CallParser`."""
        self._buffer += text
        while self._buffer and self._step():
            pass

    @abstractmethod
    def finish(self) -> None:
        """See `CallParser`."""

    @abstractmethod
    def _step(self) -> bool:
        """Read what can be read by now, the buffer not being empty; False: more text is needed."""


class JsonCallParser(SteppingParser):
    """Reads calls that are JSON objects, in the state "object"; what surrounds them is the format's own.

    An object that is no call stays text, with what stands before it. Of an answer that ends in the beginning of a
    further call, before its name, this beginning is left out.
    """

    def __init__(self, writer: AnswerWriter, state: str) -> None:
        super().__init__(writer)
        self._state = state
        self._call = JsonCall(writer)

    def finish(self) -> None:
        """See `CallParser`."""
        is_further = self._writer.num_calls > 0
        if self._state == "object":
            self._call.finish()
            if not self._call.is_call and not is_further:
                self._writer.text(self._before + self._call.raw)
        elif self._state == "text" or not is_further:
            self._writer.text(self._before + self._buffer)
        else:
            self._writer.end_call()  # where the answer ends in the arguments of one
        self._buffer = self._before = ""

    @abstractmethod
    def _behind_object(self) -> str:
        """The state in which one is behind an object, whether it was a call or not."""

    def _object(self) -> bool:
        self._buffer = self._buffer[self._call.feed(self._buffer) :]
        if not self._call.is_over:
            return False
        if not self._call.is_call:
            self._writer.text(self._before + self._call.raw)
        self._state, self._before = self._behind_object(), ""
        return True
