"""Traces: what a collector gets to see of a request, and what it does not."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from kvcomm.errors import MissingExtra
from kvcomm.server.keys import KeyRing
from kvcomm.server.traces import exporting_provider, shut_down
from tests.limits import PATIENCE_S, threads
from tests.server.conftest import HELLO, Keys, MakeClient, chat, completion

CHAT = "/v1/chat/completions"
TRACE_ID, CALLER_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"

Received = list[tuple[str, bytes]]


class Collected:
    """A provider whose spans stay here."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    @property
    def spans(self) -> list[ReadableSpan]:
        """All that have ended."""
        return list(self._exporter.get_finished_spans())

    def request(self) -> tuple[ReadableSpan, list[ReadableSpan]]:
        """The span of the only request, and its children in order."""
        (request,) = [span for span in self.spans if span.kind is SpanKind.SERVER]
        return request, [span for span in self.spans if span is not request]


@pytest.fixture
def collected() -> Collected:
    return Collected()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_and_its_stages(make_client: MakeClient, collected: Collected, stream: bool) -> None:
    client = make_client(traces=collected.provider)
    response = client.post(CHAT, json=chat(stream=stream))
    request, stages = collected.request()
    queue, prefill, decode = stages
    assert request.name == f"POST {CHAT}"
    assert request.attributes is not None
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["kvcomm.request_id"] == response.headers["x-request-id"]
    assert request.attributes["gen_ai.usage.output_tokens"] == 6
    assert [span.name for span in stages] == ["queue", "prefill", "decode"]
    assert {span.parent.span_id for span in stages if span.parent is not None} == {request.context.span_id}
    # One behind the other, and all of them while the request was there.
    assert (queue.end_time, prefill.end_time) == (prefill.start_time, decode.start_time)
    times = [request.start_time, queue.start_time, queue.end_time, prefill.end_time, decode.end_time, request.end_time]
    known = [time for time in times if time is not None]
    assert len(known) == len(times)
    assert known == sorted(known)
    assert prefill.attributes is not None
    assert prefill.attributes["kvcomm.computed_tokens"] == prefill.attributes["gen_ai.usage.input_tokens"]


def test_a_request_is_a_part_of_its_callers_trace(make_client: MakeClient, collected: Collected) -> None:
    client = make_client(traces=collected.provider)
    client.post(CHAT, json=chat(), headers={"traceparent": f"00-{TRACE_ID}-{CALLER_ID}-01"})
    request, stages = collected.request()
    assert request.parent is not None
    assert (f"{request.context.trace_id:032x}", f"{request.parent.span_id:016x}") == (TRACE_ID, CALLER_ID)
    assert {span.context.trace_id for span in stages} == {request.context.trace_id}


def test_callers_who_do_not_sample_get_no_spans(make_client: MakeClient, collected: Collected) -> None:
    client = make_client(traces=collected.provider)
    client.post(CHAT, json=chat(), headers={"traceparent": f"00-{TRACE_ID}-{CALLER_ID}-00"})
    assert collected.spans == []


@pytest.mark.parametrize("given", ["", "00-zz", f"00-{'0' * 32}-{CALLER_ID}-01", "x" * 3000])
def test_a_broken_caller_is_no_caller(make_client: MakeClient, collected: Collected, given: str) -> None:
    client = make_client(traces=collected.provider)
    assert client.post(CHAT, json=chat(), headers={"traceparent": given}).status_code == 200
    assert collected.request()[0].parent is None


def test_every_prompt_has_its_own_stages(make_client: MakeClient, collected: Collected) -> None:
    client = make_client(traces=collected.provider)
    client.post("/v1/completions", json=completion(prompt=["one two", "three four"]))
    request, stages = collected.request()
    assert [span.name for span in stages] == ["queue", "prefill", "decode"] * 2
    assert request.attributes is not None
    assert request.attributes["gen_ai.usage.output_tokens"] == 12


def test_nothing_secret_is_told(make_client: MakeClient, collected: Collected, keys: Keys, key_file: Path) -> None:
    client = make_client(traces=collected.provider, keys=KeyRing(key_file))
    client.put("/v1/segments/merger-plans", json={"content": HELLO[0]["content"]}, headers=keys.header("ann"))
    told = collected.request()[0].to_json()
    assert json.loads(told)["name"] == "PUT /v1/segments/{name}"
    assert json.loads(told)["attributes"]["kvcomm.tenant"] == "ann"
    for secret in ("merger-plans", HELLO[0]["content"], keys["ann"]):
        assert secret not in told


def test_an_unexpected_error(make_client: MakeClient, collected: Collected, monkeypatch: pytest.MonkeyPatch) -> None:
    client = make_client(traces=collected.provider)

    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(client.app.state.kvcomm.prompts, "chat", broken)  # type: ignore[attr-defined]
    assert client.post(CHAT, json=chat()).status_code == 500
    request, stages = collected.request()
    assert request.status.status_code is StatusCode.ERROR
    assert request.attributes is not None
    assert request.attributes["error.type"] == "ZeroDivisionError"
    assert stages == []
    assert "secret" not in request.to_json()


@pytest.fixture
def collector() -> Iterator[tuple[str, Received]]:
    """Address of a collector, and the paths and bodies that it has got."""
    received: Received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server, threads(server.serve_forever):
        try:
            yield f"http://127.0.0.1:{server.server_port}", received
        finally:
            server.shutdown()


def test_a_collector_gets_them(
    make_client: MakeClient, collector: tuple[str, Received], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=agents,deployment.environment.name=test")
    url, received = collector
    provider = exporting_provider(f"{url}/")
    make_client(traces=provider).post(CHAT, json=chat())
    shut_down(provider, PATIENCE_S)
    ((path, body),) = received
    assert path == "/v1/traces"
    (sent,) = ExportTraceServiceRequest.FromString(body).resource_spans
    resource = {each.key: each.value.string_value for each in sent.resource.attributes}
    assert resource["service.name"] == "agents"  # what the operator says wins
    names = [span.name for scope in sent.scope_spans for span in scope.spans]
    assert sorted(names) == sorted([f"POST {CHAT}", "queue", "prefill", "decode"])


def test_a_collector_that_is_not_there_holds_nobody_up(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the exporter tries for ten seconds, and the server's end waited for it. Here it tries on and on."""
    provider = exporting_provider("http://127.0.0.1:9")
    assert make_client(traces=provider).post(CHAT, json=chat()).status_code == 200
    is_over, has_ended = threading.Event(), threading.Event()
    shutdown = provider.shutdown
    monkeypatch.setattr(provider, "shutdown", lambda: (is_over.wait(PATIENCE_S), has_ended.set()))
    try:
        shut_down(provider, 0.1)
        assert not has_ended.is_set()
    finally:
        is_over.set()
        assert has_ended.wait(PATIENCE_S)
        shutdown()


def test_without_opentelemetry_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(MissingExtra, match=r"kvcomm\[traces\]"):
        exporting_provider("http://127.0.0.1:9")
