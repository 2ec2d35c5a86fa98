"""The sockets of KV events: one that publishes, and one that sends again what somebody has missed.

Published are the frames (topic, sequence number of eight bytes, batch). Who sees a gap asks the other socket for
everything from a number on, as far as it is still kept, and knows the end by the number -1. A reader that is slow or
gone costs nothing: what does not fit its queue is dropped for it alone, and it sees that by the numbers. Whoever can
connect can read the tokens of the announced tenants: there are no keys here.
"""

from __future__ import annotations

from collections import deque
from importlib.util import find_spec
from typing import TYPE_CHECKING, Self

from kvcomm.errors import InvalidRequest, MissingExtra
from kvcomm.server.kv_events.wire import Form

if TYPE_CHECKING:
    import zmq

EXTRA_MODULES = {"zmq": "pyzmq", "msgspec": "msgspec", "cbor2": "cbor2"}
"""What the extra `events` brings, by the module."""

MAX_QUEUED = 100_000
"""Batches that wait for one reader before it misses some."""

SEQUENCE_BYTES = 8
END = (-1).to_bytes(SEQUENCE_BYTES, "big", signed=True)
"""In the place of a sequence number: nothing more comes."""

LOCAL_HOSTS = ("127.", "localhost:", "0.0.0.0:", "[::")


class Publisher:
    """Sends batches, numbered from 0, and keeps the latest for those who ask again.

    Made by one thread, then used by one other; a `with` statement closes it.
    """

    def __init__(
        self,
        url: str,
        *,
        topic: str,
        form: Form = "map",
        replay: str | None = None,
        kept_batches: int = 10_000,
        kept_bytes: int = 2**26,
    ) -> None:
        """Make one.

        Args:
            url: such as tcp://*:5557, or tcp://HOST:5557 of a reader that listens.
            form: as current vLLM sends what is asked for again, or as it did with the form `array`: without the topic.
            replay: where others ask again, such as tcp://*:5558; None: nowhere.
            kept_batches, kept_bytes: what can be asked for again, at most.

        Raises:
            MissingExtra: pyzmq, msgspec or cbor2 is not installed.
            InvalidRequest: an address cannot be used.
        """
        require_extra()
        import zmq

        self._topic = topic.encode()
        self._form = form
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_batches = kept_batches
        self._kept_bytes = kept_bytes
        self._num_bytes = 0
        self._next = 0
        self._context = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        try:
            self._socket = self._open(zmq.PUB, url, MAX_QUEUED)
            self._replay = None if replay is None else self._open(zmq.ROUTER, replay, kept_batches + 1)
        except InvalidRequest:
            self.close()
            raise

    @property
    def address(self) -> str:
        """Where it publishes, with the port that was taken."""
        return _address(self._socket)

    @property
    def replay_address(self) -> str | None:
        """Where others ask again."""
        return None if self._replay is None else _address(self._replay)

    def publish(self, batch: bytes) -> None:
        """Send a batch to whoever listens; waits for nobody."""
        self._socket.send_multipart([self._topic, self._next.to_bytes(SEQUENCE_BYTES, "big"), batch])
        self._kept.append((self._next, batch))
        self._next += 1
        self._num_bytes += len(batch)
        while len(self._kept) > self._kept_batches or self._num_bytes > self._kept_bytes:
            self._num_bytes -= len(self._kept.popleft()[1])

    def wait(self, timeout_s: float) -> bool:
        """Answer one who asks again, if one does within that time; whether one did."""
        import zmq

        if self._replay is None or not self._replay.poll(round(1e3 * timeout_s), zmq.POLLIN):
            return False
        self._answer(self._replay, self._replay.recv_multipart())
        return True

    @property
    def can_be_asked(self) -> bool:
        """Whether `wait` waits at all."""
        return self._replay is not None

    def close(self) -> None:
        """Give the sockets back; what waits for slow readers is dropped. Idempotent."""
        for socket in self._sockets:
            socket.close(linger=0)
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _answer(self, socket: zmq.Socket[bytes], frames: list[bytes]) -> None:
        """All kept batches from the number asked for; nothing for what is no question."""
        if len(frames) != 3 or len(frames[2]) != SEQUENCE_BYTES:
            return
        client, start = frames[0], int.from_bytes(frames[2], "big")
        topic = [self._topic] if self._form == "map" else []
        for sequence, batch in self._kept:
            if sequence >= start:
                socket.send_multipart([client, b"", *topic, sequence.to_bytes(SEQUENCE_BYTES, "big"), batch])
        end = [b""] if self._form == "map" else []
        socket.send_multipart([client, b"", *end, END, b""])

    def _open(self, kind: int, url: str, max_queued: int) -> zmq.Socket[bytes]:
        import zmq

        socket = self._context.socket(kind)
        self._sockets.append(socket)
        socket.set_hwm(max_queued)
        socket.ipv6 = "[" in url
        must_bind = kind == zmq.ROUTER or is_own_address(url)
        try:
            (socket.bind if must_bind else socket.connect)(url)
        except zmq.ZMQError as error:
            way = "listen on" if must_bind else "connect to"
            raise InvalidRequest(
                f"KV events cannot {way} {url}: {error.strerror}; give a free tcp://*:PORT to listen on, or "
                "tcp://HOST:PORT of a reader that listens"
            ) from error
        return socket


def _address(socket: zmq.Socket[bytes]) -> str:
    import zmq

    return socket.get_string(zmq.LAST_ENDPOINT)


def is_own_address(url: str) -> bool:
    """Whether to listen on an address: it has a wildcard, or only this machine has it. Else somebody listens there."""
    address = url.partition("://")[2].lower()
    return "*" in address or not url.startswith("tcp://") or address.startswith(LOCAL_HOSTS)


def require_extra() -> None:
    """Raises MissingExtra where pyzmq, msgspec or cbor2 is not installed."""
    missing = [package for module, package in EXTRA_MODULES.items() if find_spec(module) is None]
    if missing:
        raise MissingExtra(f"KV events need {', '.join(missing)}: pip install 'kvcomm[events]'")
