"""A tenant that keeps what it can, and then loses its key: nobody else is to notice, and everything comes back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from eval.resilience.questions import (
    OUTPUT_LEN,
    PATIENCE_S,
    Asking,
    Found,
    Question,
    connect,
    wait_until,
)
from kvcomm.errors import ServerError
from kvcomm.lab.load.client import Client, Sample
from kvcomm.lab.load.process import ServerProcess
from kvcomm.server import Role, add_key, remove_key

CONTEXTS = "/v1/contexts"
BIG = 3_900_000
PIECE = 900_000
"""Bytes beside a few tokens: more than one context may keep, and a size that it may."""

NUM_PIECES = 100
"""Of them together more than one tenant may keep."""

NUM_PINNED = 8
POOL_SHARES = 4
"""Questions with their answers that the pool holds beside the pinned contexts."""


def hoarding(model: str, questions: Sequence[Question]) -> Found:
    """Contexts of few tokens and many bytes, named segments without end, pinned contexts; then the key is revoked."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.json"
        keys = {name: add_key(file, name) for name in ("hoarder", "neighbour")}
        keys["operator"] = add_key(file, "operator", role=Role.ADMIN)
        num_tokens = (NUM_PINNED + POOL_SHARES) * max(question.num_tokens for question in questions)
        with ServerProcess("--model", model, "--keys", str(file), "--pool-tokens", str(num_tokens)) as server:
            neighbour = _Neighbour(server.url, model, keys)
            with neighbour.meanwhile(questions):
                missed = _hoard(neighbour, questions[0])
                remove_key(file, "hoarder")
                wait_until(lambda: neighbour.call("hoarder", "GET", CONTEXTS)[0] == 401, "the key to be refused")
                removed, _ = neighbour.call("operator", "DELETE", "/admin/tenants/hoarder")
            return neighbour.found(refusals_missed=missed + int(removed != 200))


def _hoard(asking: _Neighbour, question: Question) -> int:
    """Keep whatever is taken; returns how much was that should have been refused."""

    def put(method: str, path: str, body: Any) -> int:
        return asking.call("hoarder", method, path, body)[0]

    too_big = [put("POST", CONTEXTS, body) for body in _big_bodies(BIG)]
    pieces = [put("POST", CONTEXTS, _big_bodies(PIECE)[1]) for _ in range(NUM_PIECES)]
    _, told = asking.call("hoarder", "GET", "/v1/stats")
    kept = told["kept"]
    pinned = [put("POST", CONTEXTS, {"messages": list(question.chat), "pinned": True}) for _ in range(NUM_PINNED)]
    if 201 not in pieces or 201 not in pinned:
        raise ServerError(f"nothing was kept at all, so nothing is tried: {pieces} {pinned}")
    return sum(
        [
            sum(status < 400 for status in too_big),
            int(429 not in pieces),
            int(kept["conversation_bytes"] > kept["max_kept_bytes"]),
        ]
    )


def _big_bodies(num_bytes: int) -> list[dict[str, Any]]:
    """Contexts of a few tokens: what templates do not show, or show shorter, is as long as that."""
    hello = {"role": "user", "content": "hello"}
    return [{"messages": [{**hello, field: "n" * num_bytes}]} for field in ("name", "note")]


class _Neighbour(Asking):
    """Asks with a key of its own; knows the others'."""

    def __init__(self, url: str, model: str, keys: dict[str, str]) -> None:
        super().__init__(url, model)
        self._keys = keys

    def call(self, who: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One request with somebody's key: status, and the JSON value of the answer."""
        sent = None if body is None else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {self._keys[who]}", "content-type": "application/json"}
        with closing(connect(self.url)) as connection:
            connection.request(method, path, sent, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def found(self, *, refusals_missed: int = 0, left_in_stream: int = 0) -> Found:
        """What came of it all; every page is to be free though some were pinned."""
        wait_until(lambda: not self._status()["requests_in_flight"], "requests to end")
        for tenant in self._status()["tenants"]:
            self.call("operator", "DELETE", f"/admin/tenants/{tenant['name']}/cache")
        values = self._status()
        leaked = int(values["num_pages"] - values["num_free_pages"])
        return Found(self._lost + refusals_missed, self._wrong, leaked, self._asked, left_in_stream)

    def _status(self) -> dict[str, Any]:
        return dict(self.call("operator", "GET", "/admin/status")[1])

    def _send(self, question: Question) -> Sample:
        client = Client(self.url, model=self._model, key=self._keys["neighbour"], timeout_s=PATIENCE_S)
        return client.send(question.chat, OUTPUT_LEN)
