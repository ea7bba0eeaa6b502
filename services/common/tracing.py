"""The only module that imports OpenTelemetry: one trace per request, over all processes.

A trace covers gateway, prefill, transfer and decode. Contexts cross processes as W3C `traceparent`
strings: in HTTP headers, gRPC metadata and the prefill job. Without a collector spans cost almost
nothing and contexts are empty strings.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from winnow import __version__

__all__ = [
    "Span",
    "configure_tracing",
    "context_in",
    "context_of",
    "end_span",
    "metadata_of",
    "span",
    "start_span",
]

TRACEPARENT = "traceparent"

_EXPORT_INTERVAL_MS = 1000
_PROPAGATOR = TraceContextTextMapPropagator()

Attribute = str | int | float | bool


class _Tracing:
    """This process's tracer; not the global one, which would also receive FastAPI's spans."""

    tracer: trace.Tracer = trace.NoOpTracer()


def configure_tracing(endpoint: str | None, sample_ratio: float, role: str) -> None:
    """Export this process's spans to a collector; call it once per process, None disables it.

    endpoint: OTLP over HTTP, like http://collector:4318. sample_ratio: the share traced of requests
    that do not bring a trace.
    """
    if endpoint is None:
        return
    names = {"service.name": f"winnow-{role}", "service.version": __version__}
    provider = TracerProvider(
        resource=Resource.create(names), sampler=ParentBased(TraceIdRatioBased(sample_ratio))
    )
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(
        BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_INTERVAL_MS)
    )
    _Tracing.tracer = provider.get_tracer("winnow", __version__)


def start_span(
    name: str,
    parent: str,
    *,
    is_server: bool = False,
    start_s: float | None = None,
) -> Span:
    """Start a span that the caller must end.

    parent: a traceparent; if empty, the span starts a trace. is_server: the call came from another
    process. start_s: time.monotonic() of its beginning, if that was earlier.
    """
    return _Tracing.tracer.start_span(
        name,
        _PROPAGATOR.extract({TRACEPARENT: parent}),
        kind=SpanKind.SERVER if is_server else SpanKind.INTERNAL,
        start_time=None if start_s is None else _wall_ns(start_s),
    )


@contextmanager
def span(
    name: str, parent: str, *, is_server: bool = False, **attributes: Attribute
) -> Iterator[Span]:
    """Context manager for a span; an exception from the block becomes the span's error."""
    started = start_span(name, parent, is_server=is_server)
    started.set_attributes(attributes)
    try:
        yield started
    except BaseException as error:
        end_span(started, error)
        raise
    started.end()


def end_span(span: Span, error: BaseException | None = None) -> None:
    """End a span, with an error if there was one."""
    if error is not None:
        span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
    span.end()


def context_of(span: Span) -> str:
    """The traceparent that makes other spans children of this one; empty if there is none."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
    return carrier.get(TRACEPARENT, "")


def metadata_of(context: str) -> tuple[tuple[str, str], ...]:
    """Metadata of a gRPC call that carries a trace context."""
    return ((TRACEPARENT, context),) if context else ()


def context_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The trace context in gRPC metadata or HTTP headers; empty if there is none."""
    for key, value in metadata or ():
        if key == TRACEPARENT:
            return value.decode("latin-1") if isinstance(value, bytes) else value
    return ""


def _wall_ns(monotonic_s: float) -> int:
    return time.time_ns() - round((time.monotonic() - monotonic_s) * 1e9)
