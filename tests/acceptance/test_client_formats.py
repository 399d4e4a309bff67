"""Formats and compression against a real server and a file store: operations and results of each come back."""

from __future__ import annotations

import asyncio
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from opsqueue.common import DEFAULT_SERIALIZATION_FORMAT
from opsqueue.consumer import AsyncConsumerClient, ConsumerClient, Strategy
from opsqueue.exceptions import DeserializationError, SerializationError
from opsqueue.producer import AsyncProducerClient, ProducerClient, SubmissionFailedError
from opsqueue.serialization import decode_chunk, encode_chunk, json, msgpack
from opsqueue.serialization.compression import MAGIC
from tests.support.consumer_threads import consuming, of_each_op
from tests.support.server import Server

FORMATS: dict[str, Any] = {"cbor": DEFAULT_SERIALIZATION_FORMAT, "json": json, "msgpack": msgpack}
OPERATIONS = [{"number": number, "text": "a text " * 20, "list": [number, None, 0.5]} for number in range(100)]


def same(operation: Any) -> Any:
    return operation


def stored(store_url: str) -> list[bytes]:
    return [path.read_bytes() for path in Path(store_url.removeprefix("file://")).rglob("*.bin")]


@pytest.fixture
def producer(server: Server, store_url: str) -> ProducerClient:
    return ProducerClient(server.address, store_url)


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("name", FORMATS)
def test_operations_of_each_format_come_back(
    server: Server, producer: ProducerClient, store_url: str, name: str, compression: Any
) -> None:
    chosen = {"serialization_format": FORMATS[name]}
    with consuming(server, store_url, of_each_op(same, **chosen)):
        submission = producer.insert_submission(OPERATIONS, chunk_size=30, compression=compression, **chosen)
        streamed = dict(producer.stream_submission(submission, **chosen))
        assert [result for index in range(4) for result in streamed[index]] == OPERATIONS
        results = producer.run_submission(OPERATIONS, chunk_size=30, compression=compression, **chosen)
        assert list(results) == OPERATIONS
    objects = stored(store_url)
    assert len(objects) == 16
    assert all((content[:8] == MAGIC) == (compression == "zstd") for content in objects)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_coroutines_write_and_read_compressed_chunks(server: Server, store_url: str, compression: Any) -> None:
    async def echo(operation: Any) -> Any:
        return operation

    async def main() -> None:
        async with (
            AsyncProducerClient(server.address, store_url) as producer,
            AsyncConsumerClient(server.address, store_url) as consumer,
        ):
            loop = asyncio.create_task(consumer.run_each_op(echo))
            results = await producer.run_submission(OPERATIONS, chunk_size=30, compression=compression)
            assert [result async for result in results] == OPERATIONS
            consumer.stop()
            await loop

    asyncio.run(asyncio.wait_for(main(), 60))
    assert all((content[:8] == MAGIC) == (compression == "zstd") for content in stored(store_url))


def test_arrays_times_ids_and_decimals_reach_the_callback_as_what_they_were(
    server: Server, producer: ProducerClient, store_url: str
) -> None:
    values = [datetime(2024, 5, 6, 7, 8), Decimal("NaN"), UUID(int=9), np.arange(6, dtype="<f4").reshape(2, 3)]
    seen: list[Any] = []

    def note(operation: Any) -> Any:
        seen.append(operation)
        return operation

    with consuming(server, store_url, of_each_op(note)):
        results = list(producer.run_submission(values, chunk_size=10))
    for got in (seen, results):
        assert list(map(type, got)) == list(map(type, values))
        assert list(map(repr, got)) == list(map(repr, values))


def test_raw_calls_pass_compressed_bytes_unchanged(server: Server, producer: ProducerClient, store_url: str) -> None:
    chunks = [MAGIC + b"no frame at all", b"plain"]

    def run(client: ConsumerClient) -> None:
        client.run_each_chunk_raw(lambda chunk: chunk.input_content)

    with consuming(server, store_url, run):
        assert list(producer.run_submission_chunks(chunks)) == chunks


def test_direct_chunks_may_be_compressed(server: Server, producer: ProducerClient, store_url: str) -> None:
    submission = producer.inner.insert_submission_direct(
        [encode_chunk((1, 2), DEFAULT_SERIALIZATION_FORMAT, "zstd")], None, None
    )
    with consuming(server, store_url, of_each_op(lambda number: number + 1)):
        (content,) = producer.blocking_stream_completed_submission_chunks(submission, timeout=20)
    assert content[:8] == MAGIC
    assert decode_chunk(content, DEFAULT_SERIALIZATION_FORMAT) == [2, 3]


def test_an_operation_that_cannot_be_encoded_reaches_the_caller_with_its_index(
    server: Server, producer: ProducerClient
) -> None:
    with pytest.raises(SerializationError, match=r"operation 25: .*object"):
        producer.insert_submission([*range(25), object()], chunk_size=10)
    assert producer.count_submissions() == 0


def test_a_result_that_cannot_be_encoded_fails_the_chunk_with_its_index_and_type(
    server: Server, producer: ProducerClient, store_url: str
) -> None:
    def fail_at_three(number: int) -> Any:
        return object() if number == 3 else number

    with consuming(server, store_url, of_each_op(fail_at_three)), pytest.raises(SubmissionFailedError) as caught:
        producer.run_submission(range(10), chunk_size=10)
    assert "operation 3: a value of the type object cannot be encoded" in caught.value.failure


def test_a_chunk_that_cannot_be_decoded_is_named_in_its_failure(
    server: Server, producer: ProducerClient, store_url: str
) -> None:
    submission = producer.insert_submission_chunks([b"\x81\x00", MAGIC + b"broken"])
    with consuming(server, store_url, of_each_op(same)), pytest.raises(SubmissionFailedError) as caught:
        producer.blocking_stream_completed_submission(submission, timeout=30)
    assert f"chunk 1 of submission {submission.id}: no zstd frame" in caught.value.failure


def test_a_result_that_cannot_be_decoded_is_named(server: Server, producer: ProducerClient, store_url: str) -> None:
    consumer = ConsumerClient(server.address, store_url)
    submission = producer.insert_submission([1], chunk_size=1)
    (chunk,) = consumer.reserve_chunks(1, Strategy.Oldest())
    consumer.complete_chunk(chunk.submission_id, chunk.submission_prefix, chunk.chunk_index, MAGIC)
    results = producer.blocking_stream_completed_submission(submission, timeout=20)
    with pytest.raises(DeserializationError, match=r"^the result of chunk 0: "):
        next(results)
