"""Metrics of what clients do, named as OpenTelemetry's conventions for messaging say; nothing without OpenTelemetry.

https://opentelemetry.io/docs/specs/semconv/messaging/messaging-metrics/
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.metrics import Counter, Histogram

_ATTRIBUTES = {"messaging.system": "opsqueue"}


def _is_used() -> bool:
    return "opentelemetry.metrics" in sys.modules


def sent(chunks: int) -> None:
    """A submission of so many chunks was inserted."""
    if _is_used():
        _counter("messaging.client.sent.messages", "Chunks that were inserted.").add(
            chunks, {**_ATTRIBUTES, "messaging.destination.name": "submissions", "messaging.operation.name": "insert"}
        )


def consumed(chunks: int) -> None:
    """So many chunks were reserved."""
    if _is_used():
        _counter("messaging.client.consumed.messages", "Chunks that were reserved.").add(
            chunks, {**_ATTRIBUTES, "messaging.destination.name": "chunks", "messaging.operation.name": "reserve"}
        )


def processed(seconds: float, failure: BaseException | None) -> None:
    """A callback ran for so long, and returned or raised."""
    if _is_used():
        attributes = {**_ATTRIBUTES, "messaging.destination.name": "chunks", "messaging.operation.name": "run"}
        if failure is not None:
            attributes["error.type"] = type(failure).__qualname__
        _histogram("messaging.process.duration", "How long a callback ran for one chunk.").record(seconds, attributes)


@cache
def _counter(name: str, description: str) -> Counter:
    from opentelemetry import metrics

    return metrics.get_meter("opsqueue").create_counter(name, "{message}", description)


@cache
def _histogram(name: str, description: str) -> Histogram:
    from opentelemetry import metrics

    return metrics.get_meter("opsqueue").create_histogram(name, "s", description)
