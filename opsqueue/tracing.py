"""The OpenTelemetry trace context as a carrier, and back. Uses the API alone: without an SDK all of it is free."""

from __future__ import annotations

from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import TextMapPropagator

__all__ = [
    "carrier_to_opentelemetry_tracecontext",
    "current_opentelemetry_tracecontext_to_carrier",
    "otel_propagator",
]


def otel_propagator() -> TextMapPropagator:
    """The globally configured propagator: W3C trace context and baggage unless told otherwise."""
    return propagate.get_global_textmap()


def current_opentelemetry_tracecontext_to_carrier() -> dict[str, str]:
    """The current context as a carrier; empty when nothing is being traced."""
    carrier: dict[str, str] = {}
    otel_propagator().inject(carrier)
    return carrier


def carrier_to_opentelemetry_tracecontext(carrier: dict[str, str]) -> Context:
    """The context in `carrier`, to be the parent of a new span."""
    return otel_propagator().extract(carrier)
