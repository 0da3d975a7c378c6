"""OpenTelemetry traces: a span for each classification request, its first MAX_TEXTS texts, and their stages.

Spans are made when the request is finished, from times that are measured in any case, so a request that is not
sampled costs little. The standard OTEL_* variables configure the exporter and the sampling.
"""

import os
from importlib.metadata import PackageNotFoundError, version
from threading import Thread
from time import perf_counter_ns, time_ns
from typing import TYPE_CHECKING

from de3.extras import install
from de3.runtime.background import report
from de3.runtime.engine.head import Head
from de3.runtime.engine.job import Item
from de3.server.http.exchange import Exchange

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

STOP_S = 3.0  # limit on the time to send the last spans: a collector that hangs must not delay shutdown
MAX_TEXTS = 16  # limit on the traced texts of a request; a batch of hundreds would fill the exporter's queue


def check_can_trace() -> None:
    """Raise ValueError if the otel extra is not installed."""
    try:
        version("opentelemetry-exporter-otlp-proto-http")
    except PackageNotFoundError:
        raise ValueError(f"traces: needs the otel extra, which is not installed: {install('otel')}") from None


def provider() -> "TracerProvider":
    """A tracer provider that exports spans in the background, by OTLP over HTTP; raises as check_can_trace() does."""
    check_can_trace()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    if "service.name" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        os.environ.setdefault("OTEL_SERVICE_NAME", "de3")
    tracers = TracerProvider(resource=Resource.create())
    tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return tracers


class Traces:
    """Makes the spans of requests, as part of the client's trace if the request has a `traceparent` header."""

    def __init__(self, tracers: "TracerProvider") -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace, self._parent = trace, TraceContextTextMapPropagator()
        self._provider, self._tracer = tracers, tracers.get_tracer("de3")

    def stop(self) -> None:
        """Send the remaining spans, within STOP_S."""

        def send() -> None:
            try:
                self._provider.shutdown()
            except Exception as error:
                report("traces", error)

        sending = Thread(target=send, daemon=True)
        sending.start()
        sending.join(STOP_S)

    def __call__(self, exchange: Exchange) -> None:
        """Make the spans of one request."""
        offset = time_ns() - perf_counter_ns()

        def ns(seconds: float) -> int:
            return offset + int(1e9 * seconds)

        parents = {
            str(k, "latin-1"): str(v, "latin-1")
            for k, v in exchange.scope["headers"]
            if k in (b"traceparent", b"tracestate")
        }
        root = self._tracer.start_span(
            f"POST {exchange.route}",
            self._parent.extract(parents),
            self._trace.SpanKind.SERVER,
            {
                "http.request.method": "POST",
                "http.route": exchange.route,
                "http.response.status_code": exchange.status,
                "de3.request_id": exchange.id,
                "de3.model": ", ".join(exchange.models),
            },
            start_time=ns(exchange.started),
        )
        if root.is_recording():
            if exchange.cause:
                root.set_attribute("error.type", exchange.cause)
            if exchange.status >= 500:
                root.set_status(self._trace.StatusCode.ERROR)
            inside = self._trace.set_span_in_context(root)
            if exchange.job is not None:
                root.set_attribute("de3.texts", len(exchange.job.request.texts))
                self._stage("read", inside, ns(exchange.started), ns(exchange.job.submitted))
                for part in exchange.job.parts:
                    for item, head in exchange.job.rows(part)[:MAX_TEXTS]:
                        self._text(item, head, inside, ns(exchange.job.submitted))
        root.end(ns(exchange.ended))

    def _stage(self, name: str, inside: "Context", start: int, end: int, layer: int | None = None) -> None:
        attributes = {} if layer is None else {"de3.exit.layer": layer}
        self._tracer.start_span(name, inside, attributes=attributes, start_time=start).end(end)

    def _text(self, item: Item, head: Head, inside: "Context", submitted: int) -> None:
        """Make the span of a text, with a span for each of its stages.

        A preempted text was queued more than once, but has one queue span, the first, with the total time.
        """
        o, model = head.outcome, head.part.model
        if o is None:
            return
        tokenized = submitted + int(1e9 * o.queue_s)
        modelled = tokenized + int(1e9 * o.tokenize_s)
        left = modelled + int(1e9 * o.model_s)
        span = self._tracer.start_span(
            "text",
            inside,
            attributes={
                "de3.index": item.index,
                "de3.model": model.full_name,
                "de3.tokens": o.tokens,
                "de3.exit.layer": o.layer,
                "de3.exit.num_layers": model.manifest.num_layers,
                "de3.exit.reason": o.reason,
                "de3.exit.tau": o.rule.tau,
                "de3.exit.signal": o.rule.signal.name,
                # The last layer has no risk, and an attribute cannot be null.
                **({} if o.reading.score is None else {"de3.exit.score": o.reading.score}),
            },
            start_time=submitted,
        )
        within = self._trace.set_span_in_context(span)
        self._stage("queue", within, submitted, tokenized)
        self._stage("tokenize", within, tokenized, modelled)
        self._stage("model", within, modelled, left, o.layer)
        if o.upstream_s:
            answered = left + int(1e9 * o.upstream_s)
            self._stage("upstream", within, left, answered)
            left = answered
        span.end(left)
