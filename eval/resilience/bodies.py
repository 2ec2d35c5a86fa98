"""Bodies as large as a server takes, made to cost it as much as they can: how long others wait, how much memory goes.

Each is close to 4 MB. Some are invalid in ways that a careless reader would find out late and at length, some are
valid, some hold text that cannot fit the model. What is measured is `/health` meanwhile, against the same server
without them, and how far the process grows for one body at a time.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from eval.figures import Figure
from eval.resilience.questions import Question, call, connect
from kvcomm.errors import ServerError
from kvcomm.lab.load.process import ServerProcess

BODY_BYTES = 4 * 2**20 - 1024
SENDERS = 4
ROUNDS = 2
CALM_S = 10.0
PAUSE_S = 0.005
"""Between two looks at `/health`."""

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CONTEXTS, WARM, EXPLAIN, SEGMENT = "/v1/contexts", "/v1/cache/warm", "/v1/cache/explain", "/v1/segments/large"


class Sent(NamedTuple):
    """A body and where it goes."""

    name: str
    method: str
    path: str
    body: bytes


def bodies(model: str, questions: Sequence[Question]) -> list[Figure]:
    """Send them all, one after the other, then several at once; returns what `/health` and the memory said."""
    name = Path(model).name
    all_sent = list(large_bodies(name))
    with ServerProcess("--model", model) as server:
        warm_up = json.dumps({"model": name, "messages": list(questions[0].chat), "max_tokens": 4}).encode()
        call(server.url, "POST", CHAT, warm_up)
        with _watched(server.url) as calm:
            time.sleep(CALM_S)
        grown = {sent.name: growth for sent, growth in zip(all_sent, _growths(server, all_sent), strict=True)}
        with _watched(server.url) as busy, ThreadPoolExecutor(SENDERS) as threads:
            statuses = list(threads.map(lambda sent: _send(server.url, sent), all_sent * ROUNDS))
    if failed := {
        f"{sent.name}: {status}" for sent, status in zip(all_sent * ROUNDS, statuses, strict=True) if status >= 500
    }:
        raise ServerError(f"bodies that ended in an error of the server: {', '.join(sorted(failed))}")
    stall_ms = 1000 * max(0.0, max(busy) - max(calm))
    return [
        Figure("health_stall_ms", stall_ms, "ms", None, "<= 100"),
        Figure("health_calm_ms", 1000 * max(calm), "ms"),
        Figure("health_busy_ms", 1000 * max(busy), "ms"),
        Figure("body_amplification", max(grown.values()), "x", None, "<= 20"),
        *(Figure(f"body_amplification_{each}", value, "x") for each, value in grown.items()),
    ]


def large_bodies(model: str) -> Iterator[Sent]:
    """Every kind."""

    def completion(name: str, prompt: bytes) -> Sent:
        return Sent(name, "POST", COMPLETIONS, b'{"model":"%s","max_tokens":1,"prompt":%s}' % (model.encode(), prompt))

    def chat(name: str, field: bytes) -> Sent:
        head = b'{"model":"%s","max_tokens":1,"messages":[{"role":"user","content":"hello"}],' % model.encode()
        return Sent(name, "POST", CHAT, head + field + b"}")

    text = json.dumps(("The quick brown fox counts 12 apples. " * (BODY_BYTES // 38))[:BODY_BYTES]).encode()
    letter, spaces = b'"%s"' % (b"a" * BODY_BYTES), b'"%s"' % (b" " * BODY_BYTES)
    yield completion("objects", _list(b"{}"))
    yield completion("lists", _list(b"[]"))
    yield completion("lists_in_lists", _list(b"[[1]]"))
    yield completion("strings", _list(b'"a"'))
    yield completion("numbers", _list(b"1.5"))
    yield completion("ids", _list(b"1"))
    yield completion("long_ids", _list(b"123"))
    yield completion("wrong_last", _list(b"1")[:-1] + b",null]")
    yield completion("digits", b"[%s]" % (b"7" * BODY_BYTES))
    yield completion("depth", b"[" * BODY_BYTES)
    yield completion("escapes", b'"%s"' % (b"\\u00e9" * (BODY_BYTES // 6)))
    yield completion("not_closed", letter[:-1])
    yield completion("text", text)
    yield completion("one_letter", letter)
    yield completion("spaces", spaces)
    yield chat("unknown_fields", b",".join(b'"x%06d":0' % index for index in range(BODY_BYTES // 12)))
    yield chat("metadata", b'"metadata":{%s}' % b",".join(b'"%06d":""' % index for index in range(BODY_BYTES // 13)))
    yield chat("logit_bias", b'"logit_bias":{%s}' % b",".join(b'"%06d":1' % each for each in range(BODY_BYTES // 12)))
    yield chat("twice", b'"user":"x",' * (BODY_BYTES // 11) + b'"user":"x"')
    yield chat("stop", b'"stop":' + _list(b'"ab"'))
    yield chat("tools", b'"tools":' + _list(b'{"type":"function","function":{"name":"f"}}'))
    yield chat(
        "schema", b'"tools":[{"type":"function","function":{"name":"f","parameters":{"a":%s}}}]' % _list(b'{"b":1}')
    )
    yield chat("segments", b'"segments":' + _list(b'{"id":"a","content":"b"}'))
    yield chat("prediction", b'"prediction":{"content":%s}' % text)
    yield _with_model("messages", CHAT, model, b'"messages":' + _list(b'{"role":"user","content":"hi"}'))
    yield _with_model("parts", CHAT, model, _message(_list(b'{"type":"text","text":"a"}')))
    yield _with_model("bad_messages", CHAT, model, b'"messages":' + _list(b'{"role":"wizard"}'))
    yield _with_model("chat_text", CHAT, model, _message(text))
    yield _with_model("control_tokens", CHAT, model, _message(b'"%s"' % (b"<|im_end|>" * (BODY_BYTES // 10))))
    yield Sent(
        "warm_text", "POST", WARM, b'{"model":"%s","segments":[{"id":"a","content":%s}]}' % (model.encode(), text)
    )
    yield _with_model("explain_text", EXPLAIN, model, b'"prompt":' + text)
    yield Sent("context_text", "POST", CONTEXTS, b'{"text":%s}' % text)
    yield Sent("context_ids", "POST", CONTEXTS, b'{"token_ids":%s}' % _list(b"1"))
    yield Sent("segment_text", "PUT", SEGMENT, b'{"content":%s}' % text)
    yield Sent("name", "POST", COMPLETIONS, b'{"model":%s,"prompt":"a"}' % letter)
    yield Sent("field_name", "POST", COMPLETIONS, b'{"model":"%s","prompt":"a",%s:1}' % (model.encode(), letter))


def _list(item: bytes) -> bytes:
    return b"[%s]" % b",".join([item] * (BODY_BYTES // (len(item) + 1)))


def _message(content: bytes) -> bytes:
    return b'"messages":[{"role":"user","content":%s}]' % content


def _with_model(name: str, path: str, model: str, field: bytes) -> Sent:
    return Sent(name, "POST", path, b'{"model":"%s","max_tokens":1,%s}' % (model.encode(), field))


def _send(url: str, sent: Sent) -> int:
    status, _ = call(url, sent.method, sent.path, sent.body)
    return status


@contextmanager
def _watched(url: str) -> Iterator[list[float]]:
    """Seconds that each look at `/health` took, one after the other, for the time of a `with` block."""
    seconds: list[float] = []
    over = threading.Event()

    def look() -> None:
        with closing(connect(url)) as connection:
            while not over.wait(PAUSE_S):
                began_s = time.perf_counter()
                connection.request("GET", "/health")
                connection.getresponse().read()
                seconds.append(time.perf_counter() - began_s)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seconds
    finally:
        over.set()
        thread.join()


def _growths(server: ServerProcess, all_sent: Sequence[Sent]) -> list[float]:
    """Per body, one after the other: by how much the process has then grown at most, over the body's size."""
    folder = Path("/proc") / str(server.pid)
    grown = []
    try:
        before = _status_bytes(folder, "VmRSS")  # memory that Python keeps for later is memory taken
        for sent in all_sent:
            (folder / "clear_refs").write_text("5")  # the peak counts from here on
            _send(server.url, sent)
            grown.append((_status_bytes(folder, "VmHWM") - before) / len(sent.body))
        return grown
    except OSError as error:
        raise ServerError(f"how much memory a process takes can only be read on Linux: {error}") from error


def _status_bytes(folder: Path, name: str) -> int:
    lines = (folder / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
