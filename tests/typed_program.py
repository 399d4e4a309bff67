"""What type checkers make of programs that use the library: `make check` reads this, nothing runs it."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Iterator
from typing import Any, assert_type

from opsqueue.common import json_as_bytes
from opsqueue.consumer import (
    AsyncConsumerClient,
    Chunk,
    ConsumerClient,
    FailSubmission,
    RetryLater,
    Strategy,
    chunk_context,
)
from opsqueue.opsqueue_internal import (
    Submission,
    SubmissionCancelled,
)
from opsqueue.producer import (
    DEFAULT_SERIALIZATION_FORMAT,
    AsyncProducerClient,
    ChunkFailed,
    ChunkSizeIsZeroError,
    ProducerClient,
    SerializationFormat,
    SubmissionCompleted,
    SubmissionFailed,
    SubmissionFailedError,
    SubmissionId,
    SubmissionNotCancellable,
    SubmissionNotCancellableError,
    SubmissionStatus,
    decode_chunk,
    encode_chunk,
)


def inserts(client: ProducerClient) -> Iterator[Any]:
    try:
        found = client.insert_submission(range(3), chunk_size=2, serialization_format=pickle, metadata=b"")
    except ChunkSizeIsZeroError:
        raise
    assert_type(found, SubmissionId)
    assert_type(client.insert_submission_chunks([b"1", bytearray(b"2"), memoryview(b"3")]), SubmissionId)
    assert_type(client.run_submission_chunks([b"1"]), Iterator[bytes])
    assert_type(client.get_submission_status(found), SubmissionStatus | None)
    yield from client.run_submission([1], chunk_size=1, serialization_format=json_as_bytes)
    for index, results in client.stream_submission(found, ordered=True):
        assert_type(index, int)
        yield results[0]
    try:
        client.cancel(found)
    except SubmissionNotCancellableError as error:
        assert_type(error.submission, SubmissionNotCancellable)
        assert_type(error.submission.submission, SubmissionCompleted | SubmissionFailed | SubmissionCancelled)
        assert_type(error.chunk, ChunkFailed | None)
    except SubmissionFailedError as error:
        assert_type(error.failure, str)


def statuses(client: ProducerClient) -> None:
    for status in client.list_submissions("failed", {"customer": 1}).submissions:
        assert_type(status.submission, Submission | SubmissionCompleted | SubmissionFailed | SubmissionCancelled)
        assert_type(status.submission.id, SubmissionId)
        match status:
            case SubmissionStatus.Completed(submission):
                assert_type(submission, SubmissionCompleted)
            case SubmissionStatus.Failed(submission, chunk):
                assert_type(submission, SubmissionFailed)
                assert_type(chunk, ChunkFailed)
            case SubmissionStatus.Cancelled(submission):
                assert_type(submission, SubmissionCancelled)
            case SubmissionStatus.Paused(submission):
                assert_type(submission, Submission)
            case SubmissionStatus.InProgress(submission):
                assert_type(submission, Submission)
            case _:
                raise AssertionError
        if isinstance(status, SubmissionStatus.Failed):
            assert_type(status.chunk.failure, str)


async def inserts_of_coroutines(client: AsyncProducerClient, operations: AsyncIterator[int]) -> list[Any]:
    async with client:
        found = await client.insert_submission(operations, chunk_size=1)
        assert_type(await client.wait(found), SubmissionStatus)
        return [result async for result in await client.run_submission([1], chunk_size=1)]


def encoded(operations: list[int], serialization_format: SerializationFormat = DEFAULT_SERIALIZATION_FORMAT) -> int:
    return len(decode_chunk(encode_chunk(operations, serialization_format), serialization_format))


def of_an_operation(operation: int) -> str:
    if chunk_context().cancelled:
        raise RetryLater(3.5)
    raise FailSubmission(f"{operation} cannot be done")


def of_a_chunk(operations: list[int], chunk: Chunk) -> list[str]:
    assert_type(chunk.submission_prefix, str | None)
    return [f"{operation}" for operation in operations]


def of_bytes(chunk: Chunk) -> bytearray:
    return bytearray(chunk.input_content)


async def of_an_operation_later(operation: int) -> str:
    return f"{operation}"


async def consumes(client: ConsumerClient, later: AsyncConsumerClient) -> None:
    client.run_each_op(of_an_operation, strategy=Strategy.PreferDistinct(meta_key="a", underlying=Strategy.Random()))
    client.run_each_chunk(of_a_chunk, prefetch=0)
    client.run_each_chunk_raw(of_bytes)
    await later.run_each_op(of_an_operation_later, concurrency=3)
    for chunk in client.reserve_chunks(3, Strategy.Newest()):
        assert_type(chunk, Chunk)
        client.complete_chunk(chunk.submission_id, chunk.submission_prefix, chunk.chunk_index, of_bytes(chunk))
