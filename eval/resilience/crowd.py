"""One tenant that takes all it can get, and a second one that only wants its answers.

The first holds as many requests as the server takes, heads without bodies, and then sends requests of as many prompts
as one may have. The second asks meanwhile, a few questions at a time. Whatever is not answered at once was refused.
"""

from __future__ import annotations

import json
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from eval.figures import Figure
from eval.resilience.questions import OUTPUT_LEN, PATIENCE_S, Question, connect, wait_until
from kvcomm.lab.load.process import ServerProcess
from kvcomm.server import Role, add_key

NUM_HALF_SENT = 256
NUM_PROMPTS = 128
NUM_LARGE = 2
MANY_IN_FLIGHT = 32
"""Of those prompts, before others ask; how many a server computes at a time is its own matter."""

PROMPT_TOKENS = 400
"""Of each answer to those: long enough that they all are in flight while others ask."""

NUM_CLIENTS = 4
REPEATS = 2
LONG_S = 900.0
"""For many long answers on a busy machine."""


class Answer(NamedTuple):
    """A status, and seconds until there was one."""

    status: int
    seconds: float


def crowd(model: str, questions: Sequence[Question]) -> list[Figure]:
    """Both kinds of greed, one after the other."""
    name = Path(model).name
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.json"
        greedy, modest = add_key(file, "greedy"), add_key(file, "modest")
        admin = add_key(file, "admin", role=Role.ADMIN)
        with ServerProcess("--model", model, "--keys", str(file)) as server:
            with _half_sent(server.url, greedy):
                beside_sockets = _ask_all(server.url, modest, name, questions)
            with _many_prompts(server.url, greedy, admin, name):
                beside_prompts = _ask_all(server.url, modest, name, questions)
    answers = beside_sockets + beside_prompts
    return [
        Figure("neighbours_refused", sum(each.status != 200 for each in answers), "answers", None, "0"),
        Figure("neighbours_asked", len(answers), "answers"),
        Figure("neighbours_wait_half_sent", max(each.seconds for each in beside_sockets), "s"),
        Figure("neighbours_wait_prompts", max(each.seconds for each in beside_prompts), "s"),
    ]


@contextmanager
def _half_sent(url: str, key: str) -> Iterator[None]:
    """Heads of requests whose bodies never come; those that are refused are replaced by nothing."""
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n"
        "content-type: application/json\r\ncontent-length: 1000\r\n\r\n"
    ).encode()
    parts = urlsplit(url)
    with ExitStack() as stack:
        for _ in range(NUM_HALF_SENT):
            connection = socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE_S)
            stack.enter_context(connection)
            connection.sendall(head)
        time.sleep(1)  # all of them have been looked at
        yield


@contextmanager
def _many_prompts(url: str, key: str, admin: str, model: str) -> Iterator[None]:
    """Requests of many prompts with long answers, in flight for the time of a `with` block, then left."""
    body = json.dumps(
        {
            "model": model,
            "prompt": [f"Story number {index} begins" for index in range(NUM_PROMPTS)],
            "max_tokens": PROMPT_TOKENS,
            "ignore_eos": True,
            "temperature": 0,
        }
    ).encode()
    with ExitStack() as stack:
        for _ in range(NUM_LARGE):
            connection = stack.enter_context(closing(connect(url)))
            connection.request("POST", "/v1/completions", body, _headers(key))
        wait_until(lambda: _num_in_flight(url, admin) >= MANY_IN_FLIGHT, "requests of many prompts to begin")
        yield


def _ask_all(url: str, key: str, model: str, questions: Sequence[Question]) -> list[Answer]:
    def ask(question: Question) -> Answer:
        body = {"model": model, "messages": list(question.chat), "max_tokens": OUTPUT_LEN, "temperature": 0}
        began_s = time.monotonic()
        with closing(connect(url)) as connection:
            connection.timeout = LONG_S
            connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), _headers(key))
            with connection.getresponse() as response:
                response.read()
                return Answer(response.status, time.monotonic() - began_s)

    with ThreadPoolExecutor(NUM_CLIENTS) as threads:
        return list(threads.map(ask, list(questions) * REPEATS))


def _num_in_flight(url: str, admin: str) -> int:
    with closing(connect(url)) as connection:
        connection.request("GET", "/admin/status", headers=_headers(admin))
        with connection.getresponse() as response:
            return int(json.loads(response.read())["requests_in_flight"])


def _headers(key: str) -> dict[str, str]:
    return {"content-type": "application/json", "authorization": f"Bearer {key}"}
