"""Questions with known answers, clients that ask them, and what a scenario has found."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from kvcomm.errors import ServerError
from kvcomm.lab.load.client import ChatMessage, Client, Sample
from kvcomm.lab.load.comparison import StockLoop
from kvcomm.lab.load.workloads import WorkloadSizes, shared_prefix

INPUT_LEN, OUTPUT_LEN = 12, 24
NUM_CLIENTS = 8
RETRY_S = 0.5
RETRY_FOR_S = 900.0
"""Long enough for a server to be started anew on a machine that many share."""

PATIENCE_S = 600.0
"""For what a server does soon, unless it hangs: to give back pages, to close a connection."""


class Question(NamedTuple):
    """A chat, the answer that transformers alone gives, and the tokens of both."""

    chat: tuple[ChatMessage, ...]
    answer: str
    num_tokens: int


class Found(NamedTuple):
    """What came of a scenario, summed over its answers; `left_in_stream` streams were left between begin and end."""

    lost_answers: int
    wrong_answers: int
    leaked_pages: int
    asked: int
    left_in_stream: int = 0


def make_questions(model: str, num_questions: int, prefix_len: int, seed: int) -> list[Question]:
    """Questions behind two shared beginnings of `prefix_len` words."""
    shape = WorkloadSizes(
        num_questions, prefix_len, INPUT_LEN, OUTPUT_LEN, num_prefixes=2, turns=1, branches=1, seed=seed
    )
    stock = StockLoop(model)
    made = []
    for session in shared_prefix(shape):
        answer = stock.answer(session.first_chat, OUTPUT_LEN)
        made.append(Question(session.first_chat, answer.text, answer.num_prompt_tokens + OUTPUT_LEN))
    return made


class Asking:
    """Clients that ask questions and hold the answers against the known ones. Safe to use from several threads.

    Attributes:
        url: of the server; may change while clients retry.
    """

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self._model = Path(model).name  # what a server calls it
        self.num_whole = 0
        self._counts = threading.Lock()
        self._asked = self._lost = self._wrong = 0

    def ask(self, question: Question) -> None:
        """Ask, again after an error as a client would, and count what came of it."""
        end_s = time.monotonic() + RETRY_FOR_S
        while (sample := self._send(question)).error is not None and time.monotonic() < end_s:
            time.sleep(RETRY_S)
        with self._counts:
            self._asked += 1
            self._lost += sample.error is not None
            self._wrong += sample.error is None and sample.text != question.answer
            self.num_whole += sample.error is None

    def _send(self, question: Question) -> Sample:
        return Client(self.url, model=self._model, timeout_s=PATIENCE_S).send(question.chat, OUTPUT_LEN)

    def body(self, question: Question, **fields: Any) -> bytes:
        """A streamed request as it goes over the wire, for who sends it by hand."""
        value = {"model": self._model, "messages": list(question.chat), "temperature": 0, "stream": True, **fields}
        return json.dumps(value).encode()

    def ask_all(self, questions: Sequence[Question], *, repeats: int = 1) -> None:
        """Ask all questions so many times each, several at once, and wait for the answers."""
        with ThreadPoolExecutor(NUM_CLIENTS) as threads:
            list(threads.map(self.ask, list(questions) * repeats))

    @contextmanager
    def meanwhile(self, questions: Sequence[Question]) -> Iterator[None]:
        """One client goes on asking for the time of a `with` block, each question once at least."""
        over = threading.Event()

        def go_on() -> None:
            while True:
                for question in questions:
                    self.ask(question)
                if over.is_set():
                    return

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def found(self, *, refusals_missed: int = 0, left_in_stream: int = 0) -> Found:
        """What came of it all, once nothing is asked any more; clears the server's cache.

        Args:
            refusals_missed: answers that the server should have refused and did not.
        """
        lost = self._lost + refusals_missed
        return Found(lost, self._wrong, leaked_pages(self.url), self._asked, left_in_stream)


def leaked_pages(url: str) -> int:
    """Pages that are not free once nothing is in flight and no prefix is cached; clears the cache."""
    wait_until(lambda: not status(url)["requests_in_flight"], "requests to end")
    for tenant in status(url)["tenants"]:
        call(url, "DELETE", f"/admin/tenants/{tenant['name']}/cache")
    values = status(url)
    return int(values["num_pages"] - values["num_free_pages"])


def status(url: str) -> dict[str, Any]:
    """How full a server is."""
    code, body = call(url, "GET", "/admin/status")
    if code != 200:
        raise ServerError(f"the server's status is not to be had: {code} {body[:200]!r}")
    return dict(json.loads(body))


def call(url: str, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """One request on a connection of its own: status and body of the answer."""
    with closing(connect(url)) as connection:
        connection.request(method, path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def connect(url: str) -> HTTPConnection:
    """A connection, still to be opened."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    return HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE_S)


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Raises ServerError where something does not come to hold for longer than any server that works takes."""
    end_s = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > end_s:
            raise ServerError(f"waited {PATIENCE_S:g} s for {what}")
        time.sleep(0.02)
