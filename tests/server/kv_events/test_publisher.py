"""The sockets: numbered batches, replay, and readers that are slow or gone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq

from kvcomm.errors import InvalidRequest, MissingExtra
from kvcomm.server.kv_events.publisher import END, Publisher, is_own_address
from tests.limits import PATIENCE_S

HERE = "tcp://127.0.0.1:*"
PATIENCE_MS = round(1e3 * PATIENCE_S)


class Readers:
    """Makes the sockets of readers, and closes them."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._made: list[zmq.Socket[bytes]] = []

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        self._made.append(self._context.socket(kind))
        return self._made[-1]

    def close(self) -> None:
        for socket in self._made:
            socket.close(linger=0)
        self._context.term()


@pytest.fixture
def context() -> Iterator[Readers]:
    """For the readers; whatever a test leaves open is closed."""
    readers = Readers()
    yield readers
    readers.close()


def subscriber(context: Readers, publisher: Publisher) -> zmq.Socket[bytes]:
    """A reader that gets everything from now on: it waits until its subscription has arrived."""
    socket = context.socket(zmq.SUB)
    socket.connect(publisher.address)
    socket.subscribe(b"")
    while not socket.poll(20):
        publisher.publish(b"is anybody there?")
    return socket


def asked_again(context: Readers, publisher: Publisher, *frames: bytes) -> list[list[bytes]]:
    """What the replay socket answers, up to its end."""
    assert publisher.replay_address is not None
    socket = context.socket(zmq.DEALER)
    socket.connect(publisher.replay_address)
    socket.send_multipart(frames)
    assert publisher.wait(PATIENCE_S)
    answers: list[list[bytes]] = []
    while not answers or answers[-1][-2] != END:
        assert socket.poll(PATIENCE_MS)
        answers.append(socket.recv_multipart())
    return answers


def number(value: int) -> bytes:
    return value.to_bytes(8, "big")


def test_batches_are_numbered_under_a_topic(context: Readers) -> None:
    with Publisher(HERE, topic="kv@pod@model") as publisher:
        socket = subscriber(context, publisher)
        publisher.publish(b"first")
        publisher.publish(b"second")
        seen: list[list[bytes]] = []
        while not seen or seen[-1][2] != b"second":
            assert socket.poll(PATIENCE_MS)
            seen.append(socket.recv_multipart())
        assert {frames[0] for frames in seen} == {b"kv@pod@model"}
        numbers = [int.from_bytes(frames[1], "big") for frames in seen]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert [frames[2] for frames in seen[-2:]] == [b"first", b"second"]


def test_what_was_missed_is_sent_again(context: Readers) -> None:
    with Publisher(HERE, topic="t", replay=HERE, kept_batches=3) as publisher:
        for text in (b"0", b"1", b"2", b"3"):
            publisher.publish(text)
        kept = [[b"", b"t", number(index), str(index).encode()] for index in (1, 2, 3)]
        end = [b"", b"", END, b""]
        assert asked_again(context, publisher, b"", number(0)) == [*kept, end]
        assert asked_again(context, publisher, b"", number(3)) == [kept[2], end]
        assert asked_again(context, publisher, b"", number(9)) == [end]


def test_as_older_readers_want_it(context: Readers) -> None:
    with Publisher(HERE, topic="t", form="array", replay=HERE) as publisher:
        publisher.publish(b"0")
        assert asked_again(context, publisher, b"", number(0)) == [[b"", number(0), b"0"], [b"", END, b""]]


def test_what_is_kept_is_bounded_in_bytes(context: Readers) -> None:
    with Publisher(HERE, topic="t", replay=HERE, kept_bytes=100) as publisher:
        for index in range(10):
            publisher.publish(bytes([index]) * 40)
        again = asked_again(context, publisher, b"", number(0))
        assert [int.from_bytes(frames[2], "big") for frames in again[:-1]] == [8, 9]


@pytest.mark.parametrize("frames", [(b"",), (b"", b"short"), (b"", b"x" * 9), (b"", number(0), b"more"), (number(0),)])
def test_what_is_no_question_is_left_unanswered(frames: tuple[bytes, ...], context: Readers) -> None:
    with Publisher(HERE, topic="t", replay=HERE) as publisher:
        publisher.publish(b"0")
        assert publisher.replay_address is not None
        socket = context.socket(zmq.DEALER)
        socket.connect(publisher.replay_address)
        socket.send_multipart(frames)
        assert publisher.wait(PATIENCE_S)
        assert asked_again(context, publisher, b"", number(0))[-1][-2] == END


def test_readers_that_are_slow_or_gone_hold_nobody_up(context: Readers) -> None:
    with Publisher(HERE, topic="t", kept_batches=10) as publisher:
        slow = context.socket(zmq.SUB)
        slow.set_hwm(1)
        slow.connect(publisher.address)
        slow.subscribe(b"")
        gone = subscriber(context, publisher)
        gone.close(linger=0)
        for _ in range(120_000):  # more than may wait for one reader
            publisher.publish(b"x" * 100)
        assert publisher.can_be_asked is False


def test_without_a_replay_socket_nobody_waits() -> None:
    with Publisher(HERE, topic="t") as publisher:
        assert not publisher.can_be_asked
        assert not publisher.wait(PATIENCE_S)


@pytest.mark.parametrize(
    ("url", "is_own"),
    [
        ("tcp://*:5557", True),
        ("tcp://127.0.0.1:5557", True),
        ("tcp://localhost:5557", True),
        ("tcp://[::]:5557", True),
        ("tcp://0.0.0.0:5557", True),
        ("ipc:///tmp/events", True),
        ("tcp://indexer:5557", False),
        ("tcp://10.0.0.7:5557", False),
    ],
)
def test_who_listens(url: str, is_own: bool) -> None:
    assert is_own_address(url) is is_own


def test_it_can_connect_to_a_reader_that_listens(context: Readers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcomm.server.kv_events.publisher.is_own_address", lambda url: False)
    listener = context.socket(zmq.SUB)
    listener.bind(HERE)
    listener.subscribe(b"")
    with Publisher(listener.get_string(zmq.LAST_ENDPOINT), topic="t") as publisher:
        while not listener.poll(20):
            publisher.publish(b"batch")
        assert listener.recv_multipart()[::2] == [b"t", b"batch"]


def test_a_taken_port_is_one_clear_line() -> None:
    with Publisher(HERE, topic="t") as first, pytest.raises(InvalidRequest, match="KV events cannot listen on tcp"):
        Publisher(first.address, topic="t")


@pytest.mark.parametrize("url", ["tcp://*", "tcp://*:port", "tcp://host"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"give a free tcp://\*:PORT"):
        Publisher(url, topic="t")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcomm.server.kv_events.publisher.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"KV events need pyzmq, msgspec, cbor2: pip install 'kvcomm\[events\]'"):
        Publisher(HERE, topic="t")
