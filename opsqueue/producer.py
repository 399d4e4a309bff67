"""For programs that insert submissions and read their results: operations in, results out.

Serialization, chunking and tracing are done here; chunks of bytes are the raw client's, `ProducerClient.inner`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from opsqueue.client import packing, spans
from opsqueue.client.bytes_like import BytesLike
from opsqueue.client.done_chunks import AsyncDoneChunks as AsyncDoneChunks
from opsqueue.client.done_chunks import DoneChunks as DoneChunks
from opsqueue.client.listing import SubmissionPage as SubmissionPage
from opsqueue.client.packing import ChunkSizeIsZeroError as ChunkSizeIsZeroError
from opsqueue.client.progress import Meter
from opsqueue.client.progress import Progress as Progress
from opsqueue.client.raw_producer import ProducerClient as RawProducerClient
from opsqueue.client.values import (
    ChunkFailed,
    SubmissionCompleted,
    SubmissionFailed,
    SubmissionId,
    SubmissionNotCancellable,
    SubmissionStatus,
)
from opsqueue.common import DEFAULT_SERIALIZATION_FORMAT as DEFAULT_SERIALIZATION_FORMAT
from opsqueue.common import SerializationFormat as SerializationFormat
from opsqueue.common import decode_chunk as decode_chunk
from opsqueue.common import encode_chunk as encode_chunk
from opsqueue.exceptions import (
    SubmissionFailedError,
    SubmissionNotCancellableError,
    SubmissionNotFoundError,
    TooManyMatchingSubmissionsError,
)
from opsqueue.serialization import Compression

if TYPE_CHECKING:
    from opsqueue.client.async_producer import AsyncProducerClient as AsyncProducerClient

__all__ = [
    "ChunkFailed",
    "ProducerClient",
    "SubmissionCompleted",
    "SubmissionFailed",
    "SubmissionFailedError",
    "SubmissionId",
    "SubmissionNotCancellable",
    "SubmissionNotCancellableError",
    "SubmissionNotFoundError",
    "SubmissionStatus",
    "TooManyMatchingSubmissionsError",
]


class ProducerClient:
    """Inserts submissions, waits for them and reads their results. Thread-safe; opens no connection when it is made.

    `opsqueue_url`: `host:port`, `http://…` or `https://…`. `object_store_url`: `file:///path`, `memory://`,
    `s3://bucket/path`, `gs://bucket/path` or `az://container/path`, with `object_store_options` as (name, value) pairs.
    Raises NewObjectStoreClientError for a wrong store, IncorrectUsageError for a wrong server URL.

    An operation is any value that the `serialization_format` can write; so is its result. What the methods take in
    common: `chunk_size`, the operations in a chunk (the last may have fewer); `metadata`, bytes that every consumer
    of the submission gets; `strategic_metadata`, names with integers of 64 bits by which strategies choose.

    Every method that talks to the server raises InternalProducerClientError when that fails for 5 minutes. TypeError
    is raised for an argument of another type than is said, OverflowError for integers that do not fit.
    """

    def __init__(
        self, opsqueue_url: str, object_store_url: str, *, object_store_options: Sequence[tuple[str, str]] = []
    ) -> None:
        self.inner: RawProducerClient = RawProducerClient(opsqueue_url, object_store_url, object_store_options)
        self._meter = Meter()

    def server_version(self) -> str:
        """The server's version, such as `v0.40.1`."""
        return self.inner.server_version()

    def count_submissions(self) -> int:
        """How many submissions are in progress."""
        return self.inner.count_submissions()

    def insert_submission(
        self,
        ops: Iterable[Any],
        *,
        chunk_size: int,
        serialization_format: SerializationFormat = DEFAULT_SERIALIZATION_FORMAT,
        metadata: bytes | None = None,
        strategic_metadata: dict[str, int] | None = None,
        compression: Compression | None = None,
    ) -> SubmissionId:
        """Stores `ops` in chunks of `chunk_size` operations and inserts them as one submission.

        `ops` is consumed as it is stored. Raises ChunkSizeIsZeroError before that, ChunksStorageError when a chunk
        cannot be stored, SerializationError, with the index, for an operation that cannot be encoded; what `ops` or a
        format of your own raises passes through. `compression="zstd"` compresses the chunks, and so their results; the
        reference's consumers cannot read them.
        """
        return self.insert_submission_chunks(
            packing.packed(ops, chunk_size, serialization_format, compression),
            metadata=metadata,
            strategic_metadata=strategic_metadata,
            chunk_size=chunk_size,
        )

    def insert_submission_chunks(
        self,
        chunk_contents: Iterable[BytesLike],
        *,
        metadata: bytes | None = None,
        strategic_metadata: dict[str, int] | None = None,
        chunk_size: int | None = None,
    ) -> SubmissionId:
        """As `insert_submission`, of chunks that are encoded already, each bytes or the like.

        `chunk_size`, in operations, is a hint for people and metrics.
        """
        return self.inner.insert_submission_chunks(
            iter(chunk_contents),
            metadata,
            strategic_metadata,
            chunk_size,
            spans.current_carrier(),
        )

    def find_or_insert(
        self,
        ops: Iterable[Any],
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

        However often it is called, by however many programs, there is one submission for a key (1 to 255 ASCII
        characters) as long as the server remembers it; `ops` is not touched when it is there. A failed or cancelled one
        is found for a minute after its end, then made anew. `prefix` instead of `key`: the same for the place in the
        object store, also with the reference's server; it must be given to nothing else.

        Raises as `insert_submission` does; SubmissionConflictError when a submission of other size or metadata has the
        key and is in progress; ServerLacksFeatureError for a key with the reference's server; TypeError unless either
        `key` or `prefix` is given.
        """
        return self.inner.find_or_insert_chunks(
            packing.packed(ops, chunk_size, serialization_format, compression),
            key=key,
            prefix=prefix,
            metadata=metadata,
            strategic_metadata=strategic_metadata,
            chunk_size=chunk_size,
            otel_trace_carrier=spans.current_carrier(),
        )

    def run_submission(
        self,
        ops: Iterable[Any],
        *,
        chunk_size: int,
        serialization_format: SerializationFormat = DEFAULT_SERIALIZATION_FORMAT,
        metadata: bytes | None = None,
        strategic_metadata: dict[str, int] | None = None,
        compression: Compression | None = None,
        progress: bool = False,
    ) -> Iterator[Any]:
        """Inserts, waits for the end, and gives the results in order, downloaded as they are taken.

        `progress` shows a bar on standard error meanwhile, if that is a terminal.

        Raises at the call, as `insert_submission` does and as `blocking_stream_completed_submission` does.
        """
        with spans.running_submission():
            chunks = self.run_submission_chunks(
                packing.packed(ops, chunk_size, serialization_format, compression),
                metadata=metadata,
                strategic_metadata=strategic_metadata,
                chunk_size=chunk_size,
                progress=progress,
            )
        return packing.unpacked(chunks, serialization_format)

    def run_submission_chunks(
        self,
        chunk_contents: Iterable[BytesLike],
        *,
        metadata: bytes | None = None,
        strategic_metadata: dict[str, int] | None = None,
        chunk_size: int | None = None,
        progress: bool = False,
    ) -> Iterator[bytes]:
        """As `run_submission`, of chunks that are encoded already; gives the results' chunks as they are stored."""
        submission_id = self.insert_submission_chunks(
            chunk_contents, metadata=metadata, strategic_metadata=strategic_metadata, chunk_size=chunk_size
        )
        if progress:
            from opsqueue.client import bar  # most programs show nothing

            bar.follow(
                lambda timeout: self.wait(submission_id, timeout=timeout),
                lambda: self.get_submission_status(submission_id),
            )
        return self.blocking_stream_completed_submission_chunks(submission_id)

    async def async_run_submission(
        self,
        ops: Iterable[Any],
        *,
        chunk_size: int,
        serialization_format: SerializationFormat = DEFAULT_SERIALIZATION_FORMAT,
        metadata: bytes | None = None,
        strategic_metadata: dict[str, int] | None = None,
        compression: Compression | None = None,
    ) -> AsyncIterator[Any]:
        """As `run_submission`, without blocking the event loop for the network; `ops` is taken on the loop's thread."""
        with spans.running_submission():
            chunks = await self.async_run_submission_chunks(
                packing.packed(ops, chunk_size, serialization_format, compression),
                metadata=metadata,
                strategic_metadata=strategic_metadata,
                chunk_size=chunk_size,
            )
        return packing.unpacked_async(chunks, serialization_format)

    async def async_run_submission_chunks(
        self,
        chunk_contents: Iterable[BytesLike],
        *,
        metadata: bytes | None = None,
        strategic_metadata: dict[str, int] | None = None,
        chunk_size: int | None = None,
    ) -> AsyncIterator[bytes]:
        """As `async_run_submission`, of chunks that are encoded already."""
        submission_id = await self.inner.async_insert_submission_chunks(
            iter(chunk_contents),
            metadata,
            strategic_metadata,
            chunk_size,
            spans.current_carrier(),
        )
        return await self.async_stream_completed_submission_chunks(submission_id)

    def blocking_stream_completed_submission(
        self,
        submission_id: SubmissionId,
        *,
        serialization_format: SerializationFormat = DEFAULT_SERIALIZATION_FORMAT,
        timeout: float | None = None,
    ) -> Iterator[Any]:
        """Waits for the submission's end, `timeout` seconds at most; then its results in order.

        Raises, at the call, TimeoutError, SubmissionFailedError, SubmissionCancelledError and SubmissionNotFoundError;
        ChunkRetrievalError at a result that is missing, DeserializationError or DecompressionError at one that cannot
        be decoded.
        """
        chunks = self.blocking_stream_completed_submission_chunks(submission_id, timeout=timeout)
        return packing.unpacked(chunks, serialization_format)

    def blocking_stream_completed_submission_chunks(
        self, submission_id: SubmissionId, *, timeout: float | None = None
    ) -> Iterator[bytes]:
        """As `blocking_stream_completed_submission`, of chunks as they are stored."""
        return self.inner.blocking_stream_completed_submission_chunks(submission_id, timeout)

    async def async_stream_completed_submission_chunks(self, submission_id: SubmissionId) -> AsyncIterator[bytes]:
        """As `blocking_stream_completed_submission_chunks`, without blocking the event loop and without a timeout."""
        return await self.inner.async_stream_completed_submission_chunks(submission_id)

    def try_stream_completed_submission(
        self,
        submission_id: SubmissionId,
        *,
        serialization_format: SerializationFormat = DEFAULT_SERIALIZATION_FORMAT,
    ) -> Iterator[Any]:
        """The results of a submission that is completed by now.

        Raises, at the call, SubmissionNotCompletedYetError, also for one that is unknown or cancelled, and
        SubmissionFailedError; ChunkRetrievalError at a result that is missing, DeserializationError or
        DecompressionError at one that cannot be decoded.
        """
        return packing.unpacked(self.try_stream_completed_submission_chunks(submission_id), serialization_format)

    def try_stream_completed_submission_chunks(self, submission_id: SubmissionId) -> Iterator[bytes]:
        """As `try_stream_completed_submission`, of chunks as they are stored."""
        return self.inner.try_stream_completed_submission_chunks(submission_id)

    def cancel_submission(self, submission_id: SubmissionId) -> None:
        """Cancels a submission that has not ended.

        Raises SubmissionNotFoundError when it is unknown, SubmissionNotCancellableError when it has ended.
        """
        self.inner.cancel_submission(submission_id)

    #: The same as `cancel_submission`.
    cancel = cancel_submission

    def get_submission_status(self, submission_id: SubmissionId) -> SubmissionStatus | None:
        """How far the submission is; None when it is unknown, or was forgotten some time after its end."""
        return self.inner.get_submission_status(submission_id)

    def wait(self, submission_id: SubmissionId, *, timeout: float | None = None) -> SubmissionStatus:
        """Waits for the submission's end, `timeout` seconds at most, and gives its status then, whatever it is.

        Raises TimeoutError and SubmissionNotFoundError.
        """
        return self.inner.run(self.inner.calls.wait(submission_id, timeout))

    def progress(self, submission_id: SubmissionId) -> Progress:
        """How far the submission is, how fast it goes on and how long that will take, from one look to the next.

        Raises SubmissionNotFoundError.
        """
        status = self.get_submission_status(submission_id)
        if status is None:
            raise SubmissionNotFoundError(submission_id.id)
        return self._meter.progress(status)

    def stream_submission(
        self,
        submission_id: SubmissionId,
        *,
        ordered: bool = False,
        serialization_format: SerializationFormat = DEFAULT_SERIALIZATION_FORMAT,
    ) -> Iterator[tuple[int, Sequence[Any]]]:
        """(chunk index, its results) while the submission is running: as chunks end, or in order if `ordered`.

        Raises SubmissionNotFoundError; ChunkRetrievalError, DeserializationError or DecompressionError at a result that
        cannot be had; and after all that is done SubmissionFailedError or SubmissionCancelledError. Offered by our own
        server only; InternalProducerClientError with another one.
        """
        for index, content in self.stream_submission_chunks(submission_id, ordered=ordered):
            yield index, decode_chunk(content, serialization_format, name=packing.result_name(index))

    def stream_submission_chunks(
        self, submission_id: SubmissionId, *, ordered: bool = False
    ) -> Iterator[tuple[int, bytes]]:
        """As `stream_submission`, of chunks as they are stored."""
        return self.inner.stream_submission_chunks(submission_id, ordered=ordered)

    def done_chunks(self, submission_id: SubmissionId) -> DoneChunks:
        """Which of the submission's chunks are done: an object to `refresh`, for which only what changed travels.

        Offered by our own server only; with another one its `refresh` raises InternalProducerClientError.
        """
        return self.inner.done_chunks(submission_id)

    def lookup_submission_id_by_prefix(self, prefix: str) -> SubmissionId | None:
        """The newest submission whose chunks are stored under `prefix`; None when there is none."""
        return self.inner.lookup_submission_id_by_prefix(prefix)

    def lookup_submission_ids_by_strategic_metadata(self, strategic_metadata: dict[str, int]) -> list[SubmissionId]:
        """The submissions in progress that have all these pairs, ascending; an empty dict gives all.

        Raises TooManyMatchingSubmissionsError when the server does not list as many as match.
        """
        return self.inner.lookup_submission_ids_by_strategic_metadata(strategic_metadata)

    def list_submissions(
        self,
        state: str | None = None,
        strategic_metadata: dict[str, int] | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> SubmissionPage:
        """A page of at most `limit` (1 to 1,000) submissions, ascending by id, that are in `state` and have all pairs.

        `state` is "in_progress", "paused", "completed", "failed", "cancelled", or None for all. The page's `cursor`
        gives the next one, until it is None. Ended submissions are listed until the server forgets them. Raises
        ValueError for a state, limit or cursor that there is not, ServerLacksFeatureError if the server has no lists.
        """
        return self.inner.list_submissions(state, strategic_metadata, limit, cursor)

    def retry_submission(self, submission_id: SubmissionId) -> SubmissionId:
        """Does a failed submission again: a new one with the same inputs, whose done chunks are done already.

        The failed one stays as it is. As long as its retry has not ended, and when that is completed, the same id is
        returned again. Raises SubmissionNotFoundError; SubmissionNotRetryableError when it has not failed, or another
        unfinished submission has its prefix; ServerLacksFeatureError against a server without retries.
        """
        return self.inner.retry_submission(submission_id)

    def pause_submission(self, submission_id: SubmissionId) -> None:
        """Hand out none of its chunks until it is unpaused; what consumers hold may still be completed.

        Nothing happens when it is paused already. Raises SubmissionNotFoundError, SubmissionEndedError, and
        ServerLacksFeatureError against a server without pauses.
        """
        self.inner.pause_submission(submission_id)

    def unpause_submission(self, submission_id: SubmissionId) -> None:
        """Hand out the chunks of a paused submission again; raises as `pause_submission` does."""
        self.inner.unpause_submission(submission_id)

    #: The same as `pause_submission` and `unpause_submission`.
    pause = pause_submission
    unpause = unpause_submission

    def is_completed(self, submission_id: SubmissionId) -> bool:
        """Whether the submission is completed. Raises SubmissionNotFoundError when it is unknown."""
        return self.inner.is_completed(submission_id)


def __getattr__(name: str) -> object:
    # imported late: a program without coroutines saves a quarter of a second
    if name == "AsyncProducerClient":
        from opsqueue.client.async_producer import AsyncProducerClient

        return AsyncProducerClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
