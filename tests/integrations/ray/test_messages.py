"""An ASGI app that is asked by messages: it sees the request as it was, and a client that leaves."""

from __future__ import annotations

import asyncio
import pickle
from contextlib import aclosing

import pytest
from starlette.types import Message, Receive, Scope, Send

from kvcomm.integrations.ray.keys import wanted_of
from kvcomm.integrations.ray.messages import MAX_WAITING, ForwardedRequest, answer, asked_of, scope_of

SCOPE: Scope = {
    "type": "http",
    "method": "POST",
    "path": "/v1/ä",
    "raw_path": b"/v1/%C3%A4",
    "query_string": b"a=1&a=2",
    "headers": [(b"host", b"localhost"), (b"x-many", b"1"), (b"x-many", b"2"), (b"x-request-id", b"bad id")],
    "client": ("127.0.0.1", 5),
    "server": ["localhost", 8000],
    "scheme": "http",
}


def asked(body: bytes = b"") -> ForwardedRequest:
    return asked_of(SCOPE, body, request_id="req-1")


def test_a_request_travels_whole() -> None:
    first = asked_of(SCOPE, b"{}", request_id="req-1", tenant="ann", wanted=wanted_of({"prompt": "x"}, tenant="ann"))
    there = pickle.loads(pickle.dumps(first))
    assert there == first
    seen = scope_of(there)
    for name in ("type", "method", "path", "raw_path", "query_string", "client", "scheme"):
        assert seen[name] == SCOPE[name]
    assert seen["headers"] == [*SCOPE["headers"][:3], (b"x-request-id", b"req-1")]


async def _all(app: object, request: ForwardedRequest) -> list[Message]:
    async with aclosing(answer(app, request)) as messages:  # type: ignore[arg-type]
        return [message async for message in messages]


def test_the_app_reads_the_body_and_its_answer_comes_in_order() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        assert (message["body"], message["more_body"]) == (b"hello", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(3 * MAX_WAITING):
            await send({"type": "http.response.body", "body": b"%d" % number, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    messages = asyncio.run(_all(app, asked(b"hello")))
    assert [each.get("body") for each in messages[1:-1]] == [b"%d" % number for number in range(3 * MAX_WAITING)]


def test_what_the_app_raises_is_raised_behind_what_it_has_said() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError("fault")

    async def run() -> None:
        async with aclosing(answer(app, asked())) as messages:
            assert (await anext(messages))["status"] == 200
            with pytest.raises(KeyError, match="fault"):
                await anext(messages)

    asyncio.run(run())


@pytest.mark.parametrize("num_read", [0, 1, 2])
def test_leaving_early_is_a_disconnect_that_the_app_may_take_its_time_over(num_read: int) -> None:
    ended = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

        async def write() -> None:
            while True:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
                await asyncio.sleep(0)

        writing = asyncio.create_task(write())
        while (await receive())["type"] != "http.disconnect":
            pass
        writing.cancel()
        await asyncio.sleep(0)
        ended.append(scope["path"])

    async def run() -> None:
        async with aclosing(answer(app, asked())) as messages:
            for _ in range(num_read):
                await anext(messages)

    asyncio.run(run())
    assert ended == (["/v1/ä"] if num_read else [])  # one that was never read from has not begun
