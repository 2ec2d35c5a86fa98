"""Asking a server: what its answers become, and that a key goes nowhere else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import NamedTuple

import pytest

from kvcomm.cli.remote import get_json
from kvcomm.errors import InvalidRequest, ServerError
from tests.limits import threads

ANSWERS: dict[str, tuple[int, bytes]] = {
    "/good": (200, b'{"a": 1}'),
    "/no-json": (200, b"<html>"),
    "/refused": (401, json.dumps({"error": {"message": "this key\x1b[2J is not known"}}).encode()),
    "/odd": (500, b"[1]"),
    "/elsewhere": (302, b""),
}


class Stub(NamedTuple):
    """A server of fixed answers, and what it was asked with."""

    url: str
    seen: list[tuple[str, str | None]]


@pytest.fixture
def stub() -> Iterator[Stub]:
    """A stub on a free port."""
    seen: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["authorization"]))
            status, body = ANSWERS[self.path]
            self.send_response(status)
            if status == 302:
                self.send_header("location", "/good")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Nothing on stderr."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server, threads(partial(server.serve_forever, 0.01)):
        try:
            yield Stub(f"http://127.0.0.1:{server.server_port}", seen)
        finally:
            server.shutdown()


def test_an_answer_and_the_key(stub: Stub) -> None:
    assert get_json(f"{stub.url}/good") == get_json(f"{stub.url}/good", "kv-secret") == {"a": 1}
    assert stub.seen == [("/good", None), ("/good", "Bearer kv-secret")]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no-json", "is it a kvcomm server"),
        ("/refused", "answered 401: this key\ufffd\\[2J is not known"),
        ("/odd", "answered 500: no further words"),
    ],
)
def test_what_is_no_answer_is_an_error(stub: Stub, path: str, message: str) -> None:
    with pytest.raises(ServerError, match=message):
        get_json(f"{stub.url}{path}")


def test_redirects_are_not_followed(stub: Stub) -> None:
    with pytest.raises(ServerError, match="answered 302"):
        get_json(f"{stub.url}/elsewhere", "kv-secret")
    assert [path for path, _ in stub.seen] == ["/elsewhere"]


def test_nobody_there() -> None:
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:9/x does not answer: .*refused"):
        get_json("http://127.0.0.1:9/x")


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/hostname", "", "ftp://x/y"])
def test_only_http(url: str) -> None:
    with pytest.raises(InvalidRequest, match="no address of a server"):
        get_json(url)
