"""How requests ended, in one word for counters, and those that were refused, as their own tenant may see them.

An answer ends with the finish reason that its client was told, such as "stop", "length" or "tool_calls"; a prompt that
was only computed ahead with "prefill". A request that got no whole answer ends with one of the words here. A request
for several answers ends once for each.
"""

from __future__ import annotations

from typing import NamedTuple

from kvcomm.server.errors import CLIENT_GONE
from kvcomm.server.logs import MAX_PATH, Ended

GONE = "client_gone"
"""The client disconnected before it had its answer."""
TIMED_OUT = "timed_out"
"""The answer took longer than the server lets one take."""
FAILED = "failed"
"""The server's own fault."""
REFUSED = "refused"
"""Answered with any other error."""


class Refused(NamedTuple):
    """A request that was answered with an error, `at_s` on the clock of whoever keeps it.

    Not the error itself: its traceback would keep the request's body in memory.
    """

    at_s: float
    method: str
    path: str
    status: int
    code: str
    param: str | None
    message: str
    request_id: str


def reasons_of(ended: Ended) -> list[str]:
    """How a request ended: one reason for each answer, or one for all; none where there was nothing to answer."""
    notes = ended.notes
    if notes.stopped is not None and not notes.answered:  # a client that has all of an answer may well leave first
        return [GONE if notes.stopped == GONE else TIMED_OUT]
    if ended.status == CLIENT_GONE:
        return [GONE]
    if notes.error is not None:
        return [_word(notes.error.status_code)]
    return list(notes.finish_reasons.values())


def refused_of(ended: Ended, at_s: float) -> Refused | None:
    """A request for the list of those that were refused; None: it was not, or its client did not wait for it."""
    error = ended.notes.error
    if error is None or GONE in reasons_of(ended):
        return None
    path = ended.path[:MAX_PATH]
    said = (error.status_code, error.code, error.param, error.detail)
    return Refused(at_s, ended.method, path, *said, ended.notes.request_id)


def _word(status: int) -> str:
    return {500: FAILED, 504: TIMED_OUT}.get(status, REFUSED)
