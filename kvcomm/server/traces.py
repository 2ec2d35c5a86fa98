"""OpenTelemetry traces: one span per HTTP request, and below it what its engine requests went through.

A request that carries a W3C `traceparent` becomes a part of its caller's trace, so an agent framework's own spans and
the server's stand in one picture. Attributes have OpenTelemetry's names (HTTP, generative AI) where it has some. No
prompt, answer, path or key is in them: routes are templates. Sampling and headers for the collector are told by the
standard OTEL_* variables, which the exporter reads itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvcomm import __version__
from kvcomm.engine.results import Usage
from kvcomm.errors import MissingExtra
from kvcomm.server.errors import CLIENT_GONE
from kvcomm.server.logs import Answered, RequestNotes, notes_of

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider as SdkProvider
    from opentelemetry.trace import Span, TracerProvider
    from opentelemetry.util.types import AttributeValue

SERVICE = "kvcomm"
NS_PER_S = 1_000_000_000


def exporting_provider(url: str) -> SdkProvider:
    """Spans go to a collector that speaks OTLP over HTTP, in batches and from a thread of their own.

    Args:
        url: of the collector, without the path of its traces: `http://127.0.0.1:4318`.

    Returns:
        The caller's to end with `shut_down`.

    Raises:
        MissingExtra: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise MissingExtra("traces need OpenTelemetry: pip install 'kvcomm[traces]'") from error
    named = Resource.create({SERVICE_NAME: SERVICE, SERVICE_VERSION: __version__})
    # Not at exit: a collector that does not answer would hold the process up for as long as the exporter tries.
    provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{url.rstrip('/')}/v1/traces")))
    return provider


def shut_down(provider: SdkProvider, timeout_s: float = 3.0) -> None:
    """Send what is left, unless that takes too long."""
    thread = threading.Thread(target=provider.shutdown, name="kvcomm-traces", daemon=True)
    thread.start()
    thread.join(timeout_s)


class RequestTraces:
    """ASGI middleware around `RequestLog`, whose notes it puts into a span."""

    def __init__(self, app: ASGIApp, *, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._app = app
        self._tracer = provider.get_tracer(SERVICE, __version__)
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind

        status = CLIENT_GONE

        async def send_and_look(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        caller = self._propagator.extract(dict(Headers(scope=scope)))
        span = self._tracer.start_span(scope["method"], context=caller, kind=SpanKind.SERVER)
        try:
            await self._app(scope, receive, send_and_look)
        finally:
            if span.is_recording():
                self._finish(span, scope["method"], notes_of(scope), status)
            span.end()

    def _finish(self, span: Span, method: str, notes: RequestNotes, status: int) -> None:
        from opentelemetry.trace import StatusCode, set_span_in_context

        span.update_name(f"{method} {notes.route}")
        span.set_attributes(_attributes(method, notes, status))
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        for answered in notes.answered:
            for stage in _stages(answered):
                child = self._tracer.start_span(
                    stage.name, set_span_in_context(span), start_time=stage.start_ns, attributes=stage.attributes
                )
                child.end(stage.end_ns)


class _Stage(NamedTuple):
    """A part of an engine request's time, in nanoseconds since the epoch."""

    name: str
    start_ns: int
    end_ns: int
    attributes: dict[str, AttributeValue]


def _stages(answered: Answered) -> Iterator[_Stage]:
    """Waiting for admission, up to the first token, and what was decoded behind it."""
    usage = answered.usage
    ends = [answered.submitted_ns + round(s * NS_PER_S) for s in (0.0, usage.queue_s, usage.ttft_s, usage.total_s)]
    names_and_attributes: list[tuple[str, dict[str, AttributeValue]]] = [
        ("queue", {}),
        ("prefill", _prefill(usage)),
        ("decode", {"gen_ai.usage.output_tokens": usage.generated_tokens}),
    ]
    for index, (name, attributes) in enumerate(names_and_attributes):
        yield _Stage(name, ends[index], ends[index + 1], attributes)


def _prefill(usage: Usage) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "kvcomm.exact_tokens": usage.exact_tokens,
        "kvcomm.aligned_tokens": usage.aligned_tokens,
        "kvcomm.computed_tokens": usage.computed_tokens,
        **{f"kvcomm.computed_because.{reason}": number for reason, number in usage.reasons.items()},
    }
    if usage.approximation is not None:
        attributes |= {
            "kvcomm.rung": usage.approximation.share,
            "kvcomm.rung_name": usage.approximation.rung,
            "kvcomm.predicted_divergence": usage.approximation.predicted,
        }
    return attributes


def _attributes(method: str, notes: RequestNotes, status: int) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "http.request.method": method,
        "http.route": notes.route,
        "http.response.status_code": status,
        "kvcomm.request_id": notes.request_id,
    }
    if notes.tenant is not None:
        attributes["kvcomm.tenant"] = notes.tenant
    if status >= 500:
        attributes["error.type"] = str(notes.fields.get("error", status))
    if notes.answered:
        usages = [usage for _, usage in notes.answered]
        attributes |= {
            "gen_ai.usage.input_tokens": sum(usage.prompt_tokens for usage in usages),
            "gen_ai.usage.output_tokens": sum(usage.generated_tokens for usage in usages),
        }
    return attributes
