"""AsyncProducerClient: the producer's client for programs that run on asyncio or uvloop."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from opsqueue.client import async_transfer, packing, spans, streaming
from opsqueue.client.async_http import AsyncHttpClient
from opsqueue.client.async_store import AsyncStore
from opsqueue.client.bytes_like import BytesLike
from opsqueue.client.done_chunks import COMPLETED, AsyncDoneChunks, DoneView
from opsqueue.client.exchange import Call
from opsqueue.client.ids import new_prefix
from opsqueue.client.listing import DEFAULT_LIMIT, SubmissionPage
from opsqueue.client.producer_calls import ProducerCalls, insert_body, number_of, submission_of
from opsqueue.client.progress import Meter, Progress
from opsqueue.client.store import open_store, output_path
from opsqueue.client.store_error import StoreError
from opsqueue.client.urls import parse_address
from opsqueue.client.values import AnySubmission, SubmissionId, SubmissionStatus
from opsqueue.exceptions import ChunkRetrievalError, InternalProducerClientError, SubmissionNotFoundError
from opsqueue.protocol import producer as wire
from opsqueue.serialization import DEFAULT_SERIALIZATION_FORMAT, Compression, SerializationFormat, decode_chunk

T = TypeVar("T")


class AsyncProducerClient:
    """Inserts submissions, waits for them and reads their results with coroutines; no thread per call.

    Arguments, errors and meanings as `ProducerClient` has them. To be used on one event loop; `async with` closes it.
    """

    def __init__(
        self, opsqueue_url: str, object_store_url: str, *, object_store_options: Sequence[tuple[str, str]] = []
    ) -> None:
        server = parse_address(opsqueue_url)
        self._calls = ProducerCalls(server)
        self._http = AsyncHttpClient(server)
        self._store = AsyncStore(open_store(object_store_url, object_store_options))
        self._meter = Meter()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.close()

    async def _run(self, call: Call[T]) -> T:
        return await self._http.run(call)

    async def server_version(self) -> str:
        """The server's version, such as `v0.40.1`."""
        return await self._run(self._calls.server_version())

    async def count_submissions(self) -> int:
        """How many submissions are in progress."""
        return await self._run(self._calls.count_submissions())

    async def insert_submission(
        self,
        ops: Iterable[Any] | AsyncIterable[Any],
        *,
        chunk_size: int,
        serialization_format: SerializationFormat = DEFAULT_SERIALIZATION_FORMAT,
        metadata: bytes | None = None,
        strategic_metadata: dict[str, int] | None = None,
        compression: Compression | None = None,
    ) -> SubmissionId:
        """As `ProducerClient.insert_submission`; `ops` may be of either kind, and is taken on the event loop."""
        return await self.insert_submission_chunks(
            packing.packed_async(ops, chunk_size, serialization_format, compression),
            metadata=metadata,
            strategic_metadata=strategic_metadata,
            chunk_size=chunk_size,
        )

    async def insert_submission_chunks(
        self,
        chunk_contents: Iterable[BytesLike] | AsyncIterable[BytesLike],
        *,
        metadata: bytes | None = None,
        strategic_metadata: dict[str, int] | None = None,
        chunk_size: int | None = None,
    ) -> SubmissionId:
        """As `ProducerClient.insert_submission_chunks`; the iterable may be of either kind."""
        return await self._insert(
            packing.as_async(chunk_contents), new_prefix(), None, metadata, strategic_metadata, chunk_size
        )

    async def find_or_insert(
        self,
        ops: Iterable[Any] | AsyncIterable[Any],
        *,
        chunk_size: int,
        key: str | None = None,
        prefix: str | None = None,
        serialization_format: SerializationFormat = DEFAULT_SERIALIZATION_FORMAT,
        metadata: bytes | None = None,
        strategic_metadata: dict[str, int] | None = None,
        compression: Compression | None = None,
    ) -> SubmissionId:
        """The submission with `key` that is in progress or completed; when there is none, `ops` as a new one.

        Finds, makes and raises as `ProducerClient.find_or_insert`; `ops` may be of either kind.
        """
        if (key is None) == (prefix is None):
            raise TypeError("give either key or prefix")
        found = await self._run(self._calls.find_usable(key, prefix))
        if found is not None:
            return found
        return await self._insert(
            packing.packed_async(ops, chunk_size, serialization_format, compression),
            new_prefix() if prefix is None else prefix,
            key, metadata, strategic_metadata, chunk_size,
        )  # fmt: skip

    async def _insert(
        self,
        chunk_contents: AsyncIterable[BytesLike],
        prefix: str,
        key: str | None,
        metadata: bytes | None,
        strategic_metadata: dict[str, int] | None,
        chunk_size: int | None,
    ) -> SubmissionId:
        # checked before anything is uploaded
        body = insert_body(wire.SeeObjectStorage(prefix, 0), metadata, strategic_metadata, chunk_size)
        with spans.producing("insert", "send"):
            with spans.producing("upload", "create"):
                count = await async_transfer.upload(self._store, prefix, chunk_contents)
            return await self._run(self._calls.insert_stored(prefix, count, body, spans.current_carrier(), key))

    async def run_submission(
        self,
        ops: Iterable[Any] | AsyncIterable[Any],
        *,
        chunk_size: int,
        serialization_format: SerializationFormat = DEFAULT_SERIALIZATION_FORMAT,
        metadata: bytes | None = None,
        strategic_metadata: dict[str, int] | None = None,
        compression: Compression | None = None,
    ) -> AsyncIterator[Any]:
        """Inserts, waits for the end, and gives the results in order: as `ProducerClient.run_submission`."""
        with spans.running_submission():
            submission_id = await self.insert_submission(
                ops,
                chunk_size=chunk_size,
                serialization_format=serialization_format,
                metadata=metadata,
                strategic_metadata=strategic_metadata,
                compression=compression,
            )
            return await self.stream_completed_submission(submission_id, serialization_format=serialization_format)

    async def stream_completed_submission(
        self,
        submission_id: SubmissionId,
        *,
        serialization_format: SerializationFormat = DEFAULT_SERIALIZATION_FORMAT,
        timeout: float | None = None,
    ) -> AsyncIterator[Any]:
        """Waits for the submission's end, `timeout` seconds at most; then its results in order.

        Raises as `ProducerClient.blocking_stream_completed_submission` does.
        """
        chunks = await self.stream_completed_submission_chunks(submission_id, timeout=timeout)
        return packing.unpacked_async(chunks, serialization_format)

    async def stream_completed_submission_chunks(
        self, submission_id: SubmissionId, *, timeout: float | None = None
    ) -> AsyncIterator[bytes]:
        """As `stream_completed_submission`, of chunks as they are stored."""
        submission = (await self._run(self._calls.wait_completed(submission_id, timeout))).submission
        return async_transfer.download(lambda index: self._result(submission, index), submission.chunks_total)

    async def try_stream_completed_submission(
        self,
        submission_id: SubmissionId,
        *,
        serialization_format: SerializationFormat = DEFAULT_SERIALIZATION_FORMAT,
    ) -> AsyncIterator[Any]:
        """The results of a submission that is completed by now.

        Raises as `ProducerClient.try_stream_completed_submission` does.
        """
        submission = (await self._run(self._calls.completed(submission_id))).submission
        chunks = async_transfer.download(lambda index: self._result(submission, index), submission.chunks_total)
        return packing.unpacked_async(chunks, serialization_format)

    async def stream_submission(
        self,
        submission_id: SubmissionId,
        *,
        ordered: bool = False,
        serialization_format: SerializationFormat = DEFAULT_SERIALIZATION_FORMAT,
    ) -> AsyncIterator[tuple[int, Sequence[Any]]]:
        """(chunk index, its results) while the submission is running: as chunks end, or in order if `ordered`.

        Raises as `ProducerClient.stream_submission` does.
        """
        async for index, content in self.stream_submission_chunks(submission_id, ordered=ordered):
            yield index, decode_chunk(content, serialization_format, name=packing.result_name(index))

    async def stream_submission_chunks(
        self, submission_id: SubmissionId, *, ordered: bool = False
    ) -> AsyncIterator[tuple[int, bytes]]:
        """As `stream_submission`, of chunks as they are stored."""
        status = await self.get_submission_status(submission_id)
        if status is None:
            raise SubmissionNotFoundError(submission_id.id)
        submission = submission_of(status)
        view = DoneView(
            number_of(submission_id), lambda timeout: self._calls.waiting_for_change(submission_id, timeout)
        )
        stream = async_transfer.stream(
            streaming.Finished(view, ordered=ordered),
            lambda: self._run(view.refreshing(streaming.WAIT_S)),
            lambda index: self._result(submission, index),
            lambda: view.ended,
        )
        async for pair in stream:
            yield pair
        if view.state != COMPLETED:  # the server may have forgotten a completed one while its results were read
            await self._run(self._calls.wait_completed(submission_id))

    def done_chunks(self, submission_id: SubmissionId) -> AsyncDoneChunks:
        """Which of the submission's chunks are done: an object to `refresh`, for which only what changed travels.

        Offered by our own server only; with another one its `refresh` raises InternalProducerClientError.
        """
        return AsyncDoneChunks(
            number_of(submission_id),
            lambda timeout: self._calls.waiting_for_change(submission_id, timeout),
            self._run,
        )

    async def _result(self, submission: AnySubmission, index: int) -> bytes:
        number, prefix = submission.id.id, submission.prefix
        try:
            if prefix is None:
                return await self._run(self._calls.direct_output(number, index))
            return await self._store.get(output_path(prefix, index))
        except (StoreError, InternalProducerClientError) as error:
            raise ChunkRetrievalError(
                f"the result of chunk {index} of submission {number} could not be fetched: {error}"
            ) from error

    async def wait(self, submission_id: SubmissionId, *, timeout: float | None = None) -> SubmissionStatus:
        """Waits for the submission's end, `timeout` seconds at most, and gives its status then, whatever it is.

        Raises as `ProducerClient.wait` does.
        """
        return await self._run(self._calls.wait(submission_id, timeout))

    async def progress(self, submission_id: SubmissionId) -> Progress:
        """How far the submission is, how fast it goes on and how long that will take, from one look to the next.

        Raises SubmissionNotFoundError.
        """
        status = await self.get_submission_status(submission_id)
        if status is None:
            raise SubmissionNotFoundError(submission_id.id)
        return self._meter.progress(status)

    async def cancel_submission(self, submission_id: SubmissionId) -> None:
        """Cancels a submission. Raises SubmissionNotFoundError and SubmissionNotCancellableError."""
        await self._run(self._calls.cancel_submission(submission_id))

    #: The same as `cancel_submission`.
    cancel = cancel_submission

    async def get_submission_status(self, submission_id: SubmissionId) -> SubmissionStatus | None:
        """How far the submission is; None when it is unknown."""
        return await self._run(self._calls.get_submission_status(submission_id))

    async def lookup_submission_id_by_prefix(self, prefix: str) -> SubmissionId | None:
        """The newest submission whose chunks are stored under `prefix`; None when there is none."""
        return await self._run(self._calls.lookup_submission_id_by_prefix(prefix))

    async def lookup_submission_ids_by_strategic_metadata(
        self, strategic_metadata: dict[str, int]
    ) -> list[SubmissionId]:
        """As `ProducerClient.lookup_submission_ids_by_strategic_metadata`: those in progress that have all pairs."""
        return await self._run(self._calls.lookup_submission_ids_by_strategic_metadata(strategic_metadata))

    async def list_submissions(
        self,
        *,
        state: str | None = None,
        strategic_metadata: dict[str, int] | None = None,
        limit: int = DEFAULT_LIMIT,
        cursor: str | None = None,
    ) -> SubmissionPage:
        """A page of the server's submissions, ascending by id: as `ProducerClient.list_submissions`."""
        return await self._run(self._calls.list_submissions(state, strategic_metadata, limit, cursor))

    async def retry_submission(self, submission_id: SubmissionId) -> SubmissionId:
        """Does a failed submission again, under the id that is returned: as `ProducerClient.retry_submission`."""
        return await self._run(self._calls.retry_submission(submission_id))

    async def pause_submission(self, submission_id: SubmissionId) -> None:
        """Hands out none of its chunks until it is unpaused: as `ProducerClient.pause_submission`."""
        await self._run(self._calls.set_paused(submission_id, True))

    async def unpause_submission(self, submission_id: SubmissionId) -> None:
        """The reverse of `pause_submission`; raises as `pause_submission` does."""
        await self._run(self._calls.set_paused(submission_id, False))

    #: The same as `pause_submission` and `unpause_submission`.
    pause = pause_submission
    unpause = unpause_submission

    async def is_completed(self, submission_id: SubmissionId) -> bool:
        """Whether the submission is completed. Raises SubmissionNotFoundError."""
        return await self._run(self._calls.is_completed(submission_id))
