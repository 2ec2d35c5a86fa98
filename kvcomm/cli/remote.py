"""Asking a running server: what `--server URL` stands for in several commands.

The key is sent to the server that was named and to no other: redirects are not followed.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import IO, Annotated, Any
from urllib.parse import urlsplit

import typer

from kvcomm.cli.text import printable
from kvcomm.errors import InvalidRequest, ServerError

TIMEOUT_S = 120.0
"""Of silence: a server on a busy machine may be slow, and whoever waits in vain can interrupt."""

DEFAULT_SERVER = "http://localhost:8000"
KEY_VARIABLE = "KVCOMM_API_KEY"
SERVER_VARIABLE = "KVCOMM_SERVER"

ServerFlag = Annotated[
    str,
    typer.Option("--server", envvar=SERVER_VARIABLE, metavar="URL", help="A server started by `kvcomm serve`."),
]
OptionalServerFlag = Annotated[
    str | None,
    typer.Option(
        "--server", metavar="URL", help="Use a server started by `kvcomm serve` instead of files.", show_default=False
    ),
]
KeyFlag = Annotated[
    str | None,
    typer.Option(
        "--key",
        envvar=KEY_VARIABLE,
        metavar="KEY",
        help="A tenant's API key, where the server has keys.",
        show_default=False,
    ),
]


def get_json(url: str, key: str | None = None) -> Any:
    """The JSON value that a server has at a URL; raises what `ask_json` does."""
    return ask_json("GET", url, key=key)


def ask_json(method: str, url: str, body: Any = None, *, key: str | None = None, timeout_s: float = TIMEOUT_S) -> Any:
    """What a server answers, as a JSON value.

    Args:
        body: sent as JSON; None: nothing is sent.

    Raises:
        ServerError: also for an answer that is no JSON; see `ask`.
    """
    headers = {"accept": "application/json"}
    data = None
    if body is not None:
        data, headers["content-type"] = json.dumps(body).encode(), "application/json"
    answer = ask(method, url, data, headers, key=key, timeout_s=timeout_s)
    try:
        return json.loads(answer)
    except ValueError as error:
        raise ServerError(f"{url} answered something that is no JSON; is it a kvcomm server?") from error


def ask(
    method: str,
    url: str,
    data: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    key: str | None = None,
    timeout_s: float = TIMEOUT_S,
) -> bytes:
    """What a server answers.

    Raises:
        InvalidRequest: the URL is none of http or https.
        ServerError: no answer, or a refusal.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise InvalidRequest(f"{url!r} is no address of a server; they begin with http:// or https://")
    sent = dict(headers or {}) | ({} if key is None else {"authorization": f"Bearer {key}"})
    try:
        request = urllib.request.Request(url, data, sent, method=method)
        with _opener().open(request, timeout=timeout_s) as answer:
            content: bytes = answer.read()
            return content
    except urllib.error.HTTPError as error:
        with error:
            raise ServerError(f"{url} answered {error.code}: {_words(error)}") from error
    except (OSError, HTTPException) as error:
        raise ServerError(f"{url} does not answer: {getattr(error, 'reason', None) or error}") from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Lets a redirect be an error."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_NoRedirect)


def _words(answer: IO[bytes]) -> str:
    """The server's own words, if it has some in the usual shape."""
    try:
        return printable(str(json.loads(answer.read())["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return "no further words"
