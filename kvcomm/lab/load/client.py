"""One streamed request, timed: a thread of its own and the standard library, so that little time is the client's.

Every request has a connection of its own, and its clock starts when that stands: what a server with kept connections
shows. `send` never raises for what a server or the network does: a failed request is a result, too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from kvcomm.errors import InvalidRequest, ServerError

ChatMessage = Mapping[str, str]

DATA, DONE = b"data: ", b"[DONE]"


class Sample(NamedTuple):
    """What came of one request.

    Attributes:
        sent_s: when the request was sent, by the clock of `time.perf_counter`.
        events_s: when each piece of text arrived, in seconds from then; the first one is the time to the first token.
        total_s: until the end of the stream.
        usage: as the server told it; empty if it did not.
        error: why the request failed; None: the stream came to its proper end.
    """

    sent_s: float
    events_s: tuple[float, ...]
    total_s: float
    text: str
    usage: Mapping[str, Any]
    error: str | None

    @property
    def output_tokens(self) -> int:
        """As the server counted them; pieces of text if it did not."""
        return int(self.usage.get("completion_tokens", len(self.events_s)))


@dataclass
class _Stream:
    """A stream as far as it has come."""

    start_s: float
    begun: Callable[[str], None] | None = None
    events_s: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    usage: Mapping[str, Any] = field(default_factory=dict)

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take in one chunk; the first one tells the answer's id."""
        if self.begun is not None:
            begun, self.begun = self.begun, None
            begun(str(chunk["id"]))
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices", ()):
            text = choice["delta"].get("content") if "delta" in choice else choice["text"]
            # An answer may be over before there is text: its end is then the first that is heard of a token.
            if text or (choice.get("finish_reason") and not self.events_s):
                self.events_s.append(time.perf_counter() - self.start_s)
                self.texts.append(text or "")

    def sample(self, error: str | None) -> Sample:
        """What has come, as the result."""
        total_s = time.perf_counter() - self.start_s
        return Sample(self.start_s, tuple(self.events_s), total_s, "".join(self.texts), self.usage, error)


class Client:
    """Sends chat requests to one server; safe to use from several threads."""

    def __init__(self, url: str, *, model: str | None = None, key: str | None = None, timeout_s: float = 600.0) -> None:
        """Make one.

        Args:
            url: of the server, without the path of an endpoint.
            model: to ask for; None: the first one that the server offers.
            timeout_s: of silence on a connection.

        Raises:
            InvalidRequest: the URL is not that of a server.
            ServerError: it does not tell what models it has.
        """
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise InvalidRequest(f"{url!r} is no URL of a server; give one such as http://127.0.0.1:8000")
        self._is_secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        self._headers = {"content-type": "application/json"}
        if key is not None:
            self._headers["authorization"] = f"Bearer {key}"
        self._model = model or self.model_name()

    def send(
        self,
        messages: Sequence[ChatMessage],
        max_tokens: int,
        *,
        begun: Callable[[str], None] | None = None,
        **fields: Any,
    ) -> Sample:
        """Ask for a greedy answer and read it to its end.

        Args:
            begun: is called with the answer's id as soon as its stream begins.
            fields: more of the request's body.
        """
        return self._stream("chat/completions", {"messages": list(messages)}, max_tokens, begun, fields)

    def complete(self, prompt: str | Sequence[int], max_tokens: int, **fields: Any) -> Sample:
        """Ask for the continuation of a text or of token ids, greedy unless `fields` say otherwise, as `send` does."""
        return self._stream("completions", {"prompt": prompt}, max_tokens, None, fields)

    def _stream(
        self,
        endpoint: str,
        asked: Mapping[str, Any],
        max_tokens: int,
        begun: Callable[[str], None] | None,
        fields: Mapping[str, Any],
    ) -> Sample:
        body = json.dumps(
            {
                "model": self._model,
                **asked,
                "max_tokens": max_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                **fields,
            }
        ).encode()
        stream = _Stream(time.perf_counter(), begun)
        connection = self._connection()
        try:
            connection.connect()
            stream.start_s = time.perf_counter()
            connection.request("POST", f"{self._path}/v1/{endpoint}", body, self._headers)
            error = _read(connection.getresponse(), stream)
        except (OSError, HTTPException) as failure:
            error = f"{type(failure).__name__}: {failure}"
        finally:
            connection.close()
        return stream.sample(error)

    def model_name(self) -> str:
        """The first model that the server offers.

        Raises:
            ServerError: it does not say.
        """
        connection = self._connection()
        try:
            connection.request("GET", f"{self._path}/v1/models", headers=self._headers)
            response = connection.getresponse()
            answer = response.read()
            return str(json.loads(answer)["data"][0]["id"])
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            raise ServerError(f"the server at {self._host} does not list its models: {error!r}") from error
        finally:
            connection.close()

    def _connection(self) -> HTTPConnection:
        kind = HTTPSConnection if self._is_secure else HTTPConnection
        return kind(self._host, self._port, timeout=self._timeout_s)


def _read(response: HTTPResponse, stream: _Stream) -> str | None:
    """Take in a response; what was wrong with it, None if nothing was."""
    if response.status != 200:
        return f"{response.status}: {response.read().decode(errors='replace')[:500]}"
    try:
        for data in _events(response):
            if data == DONE:
                return None
            chunk = json.loads(data)
            if "error" in chunk:
                return f"in the stream: {chunk['error']}"
            stream.add(chunk)
    except (ValueError, KeyError, AttributeError, TypeError) as failure:
        return f"not a stream of answers: {failure!r}"
    return "the stream broke off"


def _events(response: HTTPResponse) -> Iterator[bytes]:
    for line in response:
        if line.startswith(DATA):
            yield line.removeprefix(DATA).strip()
