"""What OpenTelemetry gets to see of one submission, from its producer to its last chunk."""

from __future__ import annotations

import asyncio
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from opsqueue.client import meters
from opsqueue.consumer import AsyncConsumerClient
from opsqueue.producer import AsyncProducerClient, ProducerClient
from tests.support.consumer_threads import consuming, of_each_op
from tests.support.server import Server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: provider)
    yield exporter
    provider.shutdown()


def by_name(exporter: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    found: dict[str, list[ReadableSpan]] = {}
    for span in exporter.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    return found


def check(spans: dict[str, list[ReadableSpan]]) -> None:
    assert set(spans) == {
        "run_submission", "insert submissions", "upload submissions", "reserve chunks", "download chunks", "run_chunk",
        "complete chunks",
    }  # fmt: skip
    (run,) = spans["run_submission"]
    trace_id = run.get_span_context().trace_id
    (insert,), (upload,) = spans["insert submissions"], spans["upload submissions"]
    assert insert.parent is not None
    assert insert.parent.span_id == run.get_span_context().span_id
    assert upload.parent is not None
    assert upload.parent.span_id == insert.get_span_context().span_id
    assert insert.kind is trace.SpanKind.PRODUCER
    for name in ("download chunks", "run_chunk", "complete chunks"):
        assert len(spans[name]) == 3
        assert {span.get_span_context().trace_id for span in spans[name]} == {trace_id}
        assert {(span.attributes or {})["chunk_index"] for span in spans[name]} == {0, 1, 2}
    for span in spans["run_chunk"]:
        assert span.kind is trace.SpanKind.CONSUMER
        assert [link.context.trace_id for link in span.links] == [trace_id]
    linked = [link.context.trace_id for span in spans["reserve chunks"] for link in span.links]
    assert linked == [trace_id] * 3
    for spans_of_name in spans.values():
        for span in spans_of_name:
            if span.name != "run_submission":
                assert (span.attributes or {})["messaging.system"] == "opsqueue"
                assert "messaging.operation.type" in (span.attributes or {})


def test_every_step_has_a_span_in_the_producers_trace(
    server: Server, store_url: str, exporter: InMemorySpanExporter
) -> None:
    producer = ProducerClient(server.address, store_url)
    with consuming(server, store_url, of_each_op(abs)):
        assert list(producer.run_submission([-1, -2, -3], chunk_size=1)) == [1, 2, 3]
    check(by_name(exporter))


async def test_coroutines_have_the_same_spans(server: Server, store_url: str, exporter: InMemorySpanExporter) -> None:
    async def absolute(number: int) -> int:
        return abs(number)

    async with (
        AsyncProducerClient(server.address, store_url) as producer,
        AsyncConsumerClient(server.address, store_url) as consumer,
    ):
        loop = asyncio.create_task(consumer.run_each_op(absolute))
        results = await producer.run_submission([-1, -2, -3], chunk_size=1)
        assert [result async for result in results] == [1, 2, 3]
        consumer.stop()
        await loop
    check(by_name(exporter))


def test_counts_and_durations_are_measured(server: Server, store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(metrics, "get_meter", lambda name: provider.get_meter(name))
    meters._counter.cache_clear()
    meters._histogram.cache_clear()
    producer = ProducerClient(server.address, store_url)
    with consuming(server, store_url, of_each_op(abs)):
        list(producer.run_submission(range(10), chunk_size=2))
    meters._counter.cache_clear()
    meters._histogram.cache_clear()
    data = reader.get_metrics_data()
    assert data is not None
    found = {
        metric.name: metric.data.data_points[0]
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    assert found["messaging.client.sent.messages"].value == 5
    assert found["messaging.client.consumed.messages"].value == 5
    assert found["messaging.process.duration"].count == 5


def test_a_bar_is_shown_on_a_terminal_and_nothing_elsewhere(server: Server, store_url: str) -> None:
    code = (
        "import sys; from opsqueue.producer import ProducerClient; "
        "print(sum(ProducerClient(*sys.argv[1:]).run_submission(range(9), chunk_size=1, progress=True)))"
    )
    command = [sys.executable, "-c", code, server.address, store_url]
    with consuming(server, store_url, of_each_op(abs)):
        quiet = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
        master, terminal = pty.openpty()
        shown = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, timeout=60, cwd=ROOT, check=True)
        os.close(terminal)
        drawn = os.read(master, 65536).decode()
        os.close(master)
    assert (quiet.stdout, quiet.stderr) == ("36\n", "")
    assert shown.stdout == b"36\n"
    assert "9/9" in drawn
