"""The scenarios, each on a fresh server: bring the trouble about, have clients ask meanwhile, count."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPException
from urllib.parse import urlsplit

from eval.resilience.questions import (
    INPUT_LEN,
    PATIENCE_S,
    Asking,
    Found,
    Question,
    call,
    connect,
    wait_until,
)
from kvcomm.lab.load.process import ServerProcess

CHAT = "/v1/chat/completions"
HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"

JSON = {"content-type": "application/json"}

KILL_REPEATS = 3
KILL_AFTER = 4
LEAVERS = 16
LEAVER_TOKENS = 64
MAX_EVENTS = 6
"""Events that a leaver reads at most before it leaves."""

POOL_QUESTIONS = 3
"""Questions with their answers that a small pool holds; there are more clients."""

FULL_REPEATS = 4
LARGE_BYTES = 10_000_000
NUM_LARGE = 8
NUM_SLOW = 100
SLOW = {"KVCOMM_SERVE_HEADER_TIMEOUT_S": "2", "KVCOMM_SERVE_BODY_TIMEOUT_S": "2"}
"""Timeouts of a server that slow clients try; so short only to have the result soon."""


def kill(model: str, questions: Sequence[Question]) -> Found:
    """SIGKILL while all clients wait for answers, and a server in its place on the same port."""
    with ServerProcess("--model", model) as first:
        asking = Asking(first.url, model)
        load = threading.Thread(target=asking.ask_all, args=(questions,), kwargs={"repeats": KILL_REPEATS})
        load.start()
        try:
            wait_until(lambda: asking.num_whole >= KILL_AFTER, "the first answers")
        finally:
            first.kill()
            port = str(urlsplit(first.url).port)
            with ServerProcess("--model", model, "--port", port):
                load.join()
                found = asking.found()
    return found


def disconnect(model: str, questions: Sequence[Question], num_streams: int, seed: int) -> Found:
    """Clients that leave in the middle of their streams; a tenth more leave before the first event."""
    draw = random.Random(seed)
    num_events = [draw.randint(1, MAX_EVENTS) for _ in range(num_streams)] + [0] * (num_streams // 10)
    draw.shuffle(num_events)
    with ServerProcess("--model", model) as server:
        asking = Asking(server.url, model)
        leaving = [(questions[index % len(questions)], number) for index, number in enumerate(num_events)]
        with asking.meanwhile(questions), ThreadPoolExecutor(LEAVERS) as threads:
            in_stream = list(threads.map(lambda each: _leave(asking, *each), leaving))
        return asking.found(left_in_stream=in_stream.count(True))


def full_pool(model: str, questions: Sequence[Question]) -> Found:
    """More clients than fit the pool at once, and a prompt longer than the pool, which is to be refused."""
    pool_tokens = POOL_QUESTIONS * max(question.num_tokens for question in questions)
    with ServerProcess("--model", model, "--pool-tokens", str(pool_tokens)) as server:
        asking = Asking(server.url, model)
        question = questions[0]
        too_long = question._replace(chat=(*question.chat[:-1], {"role": "user", "content": "word " * pool_tokens}))
        with asking.meanwhile(questions):
            refused = call(server.url, "POST", CHAT, asking.body(too_long, max_tokens=1))
            asking.ask_all(questions, repeats=FULL_REPEATS)
        return asking.found(refusals_missed=int(not _is_typed(refused)))


def large_body(model: str, questions: Sequence[Question]) -> Found:
    """Bodies over the limit: to be refused before they are read, or as soon as they are too long."""
    with ServerProcess("--model", model) as server:
        asking = Asking(server.url, model)
        declared = f"{HEAD}content-length: {LARGE_BYTES}\r\n\r\n".encode()
        chunked = f"{HEAD}transfer-encoding: chunked\r\n\r\n{LARGE_BYTES:x}\r\n".encode()
        with asking.meanwhile(questions):
            answers = [
                _answer_to(server.url, head, b"x" * LARGE_BYTES)
                for head in (declared, chunked)
                for _ in range(NUM_LARGE)
            ]
            for _ in range(NUM_LARGE):  # and some who go before they have sent all
                with _raw(server.url) as connection:
                    connection.sendall(chunked + b"x" * (LARGE_BYTES // 10))
        return asking.found(refusals_missed=sum(b" 413 " not in answer for answer in answers))


def slow_loris(model: str, questions: Sequence[Question]) -> Found:
    """Clients that never finish their headers or bodies: to be cut off, and nobody else is to notice."""
    with ServerProcess("--model", model, variables=SLOW) as server, ExitStack() as stack:
        asking = Asking(server.url, model)
        head = f"{HEAD}content-length: 1000\r\n\r\n".encode()
        slow = [stack.enter_context(_raw(server.url)) for _ in range(NUM_SLOW)]
        with asking.meanwhile(questions):
            for index, connection in enumerate(slow):
                connection.sendall(head[:INPUT_LEN] if index % 2 else head)
            with ThreadPoolExecutor(NUM_SLOW) as threads:
                cut_off = list(threads.map(_drip, slow))
        return asking.found(refusals_missed=cut_off.count(False))


def _leave(asking: Asking, question: Question, num_events: int) -> bool:
    """Ask, read so many events, and go without a word; whether the stream had begun and not ended."""
    last = b""
    with closing(connect(asking.url)) as connection:
        try:
            connection.request("POST", CHAT, asking.body(question, max_tokens=LEAVER_TOKENS), JSON)
            if num_events:
                with connection.getresponse() as response:
                    for _ in range(num_events):
                        last = response.readline()
                        response.readline()  # an empty line behind each event
        except (OSError, HTTPException):
            return False  # refused or cut off: it is left all the same
    return last.startswith(b"data: {")


def _is_typed(answer: tuple[int, bytes]) -> bool:
    """Whether it is a client's error in OpenAI's shape."""
    status, body = answer
    return 400 <= status < 500 and bool(json.loads(body)["error"]["message"])


def _answer_to(url: str, head: bytes, body: bytes) -> bytes:
    """The first line of what comes back; a server that will not read the body may close before it is sent."""
    with _raw(url) as connection:
        try:
            connection.sendall(head)
            connection.sendall(body)
        except OSError:
            pass  # what it said before it closed is still to be read
        return connection.recv(64)


def _drip(connection: socket.socket) -> bool:
    """Send a byte now and then; whether the server ends this."""
    connection.settimeout(0.25)
    for _ in range(int(PATIENCE_S / 0.25)):
        try:
            connection.sendall(b"x")
            if not connection.recv(4096):
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


def _raw(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE_S)
