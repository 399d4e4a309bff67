"""Spans of what clients do, named and described as OpenTelemetry's conventions for messaging say (version 1.30).

Nothing is imported and nothing is made as long as the program has not imported OpenTelemetry itself: then nobody has
set up a provider or a context. https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

from opsqueue.client import convert

if TYPE_CHECKING:
    from opsqueue.client.values import Chunk

#: The value of messaging.system.
SYSTEM: Final = "opsqueue"

Attributes = Mapping[str, str | int]


def is_used() -> bool:
    """Whether the program uses OpenTelemetry."""
    return "opentelemetry.trace" in sys.modules


def is_recorded() -> bool:
    """Whether somebody may look at a span."""
    if not is_used():
        return False
    from opentelemetry import trace

    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def producing(operation: str, kind: str, attributes: Attributes | None = None) -> AbstractContextManager[None]:
    """A span of a producer's: `operation` is what we call it, `kind` one of the conventions' create, send, receive."""
    return _span("opsqueue.producer", operation, "submissions", kind, attributes) if is_recorded() else nullcontext()


def consuming(operation: str, kind: str, attributes: Attributes | None = None) -> AbstractContextManager[None]:
    """A span of a consumer's: `kind` is one of the conventions' receive, process, settle."""
    return _span("opsqueue.consumer", operation, "chunks", kind, attributes) if is_recorded() else nullcontext()


def of_chunk(submission: int, chunk: int) -> Attributes:
    """What says which chunk a span is about."""
    return {"messaging.message.id": f"{submission}/{chunk}", "submission_id": submission, "chunk_index": chunk}


@contextmanager
def _span(tracer: str, operation: str, destination: str, kind: str, attributes: Attributes | None) -> Iterator[None]:
    from opentelemetry import trace

    kinds = {"send": trace.SpanKind.PRODUCER, "create": trace.SpanKind.PRODUCER, "process": trace.SpanKind.CONSUMER}
    with trace.get_tracer(tracer).start_as_current_span(
        f"{operation} {destination}",
        kind=kinds.get(kind, trace.SpanKind.CLIENT),
        attributes={
            "messaging.system": SYSTEM,
            "messaging.destination.name": destination,
            "messaging.operation.name": operation,
            "messaging.operation.type": kind,
            **(attributes or {}),
        },
    ):
        yield


def of_submission(
    operation: str, kind: str, carrier_text: str, submission: int, chunk: int
) -> AbstractContextManager[None]:
    """As `consuming`, about one chunk, as a child of its producer's span; for threads that have no context."""
    if not is_recorded():
        return nullcontext()
    return _in(convert.carrier(carrier_text), operation, kind, of_chunk(submission, chunk))


@contextmanager
def _in(carrier: Mapping[str, str], operation: str, kind: str, attributes: Attributes) -> Iterator[None]:
    from opentelemetry import context as otel_context

    from opsqueue.tracing import carrier_to_opentelemetry_tracecontext

    token = otel_context.attach(carrier_to_opentelemetry_tracecontext(dict(carrier)))
    try:
        with _span("opsqueue.consumer", operation, "chunks", kind, attributes):
            yield
    finally:
        otel_context.detach(token)


def reserved(seconds: float, carriers: Sequence[Mapping[str, str]]) -> None:
    """Notes a reservation that took so long until now, with a link to the producer's span of each chunk."""
    if not is_recorded():
        return
    from opentelemetry import trace

    from opsqueue.tracing import carrier_to_opentelemetry_tracecontext

    producers = [
        trace.get_current_span(carrier_to_opentelemetry_tracecontext(dict(carrier))).get_span_context()
        for carrier in carriers
    ]
    now = time.time_ns()
    span = trace.get_tracer("opsqueue.consumer").start_span(
        "reserve chunks",
        kind=trace.SpanKind.CLIENT,
        start_time=now - int(seconds * 1e9),
        links=[trace.Link(producer) for producer in producers if producer.is_valid],
        attributes={
            "messaging.system": SYSTEM,
            "messaging.destination.name": "chunks",
            "messaging.operation.name": "reserve",
            "messaging.operation.type": "receive",
            "messaging.batch.message_count": len(carriers),
        },
    )
    span.end(now)


@contextmanager
def running_chunk(chunk: Chunk) -> Iterator[None]:
    """The span "run_chunk" around a callback: a child of the producer's span, and linked to it.

    The producer's context is attached, so that the callback sees its baggage.
    """
    if not chunk.submission_otel_trace_carrier and not is_used():
        yield
        return
    from opentelemetry import baggage, trace
    from opentelemetry import context as otel_context

    from opsqueue.tracing import carrier_to_opentelemetry_tracecontext

    context = carrier_to_opentelemetry_tracecontext(chunk.submission_otel_trace_carrier)
    attributes: dict[str, str | int] = {
        name: value if isinstance(value, str | int) else str(value) for name, value in baggage.get_all(context).items()
    }
    attributes |= {
        "messaging.system": SYSTEM,
        "messaging.destination.name": "chunks",
        "messaging.operation.name": "run",
        "messaging.operation.type": "process",
        **of_chunk(chunk.submission_id.id, chunk.chunk_index.id),
    }
    producer = trace.get_current_span(context).get_span_context()
    token = otel_context.attach(context)
    try:
        with trace.get_tracer("opsqueue.consumer").start_as_current_span(
            "run_chunk",
            kind=trace.SpanKind.CONSUMER,
            attributes=attributes,
            links=[trace.Link(producer)] if producer.is_valid else [],
        ):
            yield
    finally:
        otel_context.detach(token)


def running_submission() -> AbstractContextManager[None]:
    """The span "run_submission" around an insert and the wait for its end."""
    if not is_recorded():
        return nullcontext()
    from opentelemetry import trace

    return _entered(trace.get_tracer("opsqueue.producer").start_as_current_span("run_submission"))


@contextmanager
def _entered(span: AbstractContextManager[object]) -> Iterator[None]:
    with span:
        yield


def current_carrier() -> dict[str, str]:
    """The current context, to be sent; empty when nothing is being traced."""
    if not is_used():
        return {}
    from opsqueue.tracing import current_opentelemetry_tracecontext_to_carrier

    return current_opentelemetry_tracecontext_to_carrier()
