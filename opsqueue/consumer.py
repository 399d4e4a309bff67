"""For programs that work on chunks: reserve, run, report.

Serialization, tracing and the loops' forms are here; chunks of bytes are the raw client's, `ConsumerClient.inner`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from opsqueue import opsqueue_internal
from opsqueue.client import packing, spans
from opsqueue.client.async_consumer import AsyncConsumerClient as AsyncConsumerClient
from opsqueue.client.bytes_like import BytesLike
from opsqueue.client.callbacks import check_plain
from opsqueue.client.chunk_context import ChunkContext as ChunkContext
from opsqueue.client.chunk_context import FailSubmission as FailSubmission
from opsqueue.client.chunk_context import RetryLater as RetryLater
from opsqueue.client.chunk_context import chunk_context as chunk_context
from opsqueue.common import DEFAULT_SERIALIZATION_FORMAT as DEFAULT_SERIALIZATION_FORMAT
from opsqueue.common import SerializationFormat as SerializationFormat
from opsqueue.opsqueue_internal import Chunk, ChunkIndex, Strategy, SubmissionId

__all__ = ["Chunk", "ConsumerClient", "Strategy", "SubmissionId"]

#: The strategy of a loop that names none.
DEFAULT_STRATEGY: Strategy = Strategy.Random()


class ConsumerClient:
    """Works on chunks, one connection for all its threads, made at the first call and again whenever it is lost.

    `opsqueue_url`: `host:port`, `ws://…`, `wss://…`, `http://…` or `https://…`. The object store as in ProducerClient.

    Raises NewObjectStoreClientError for a wrong store, IncorrectUsageError for a wrong server URL. A server that cannot
    be reached is tried for ever; one that does not speak the protocol raises InternalConsumerClientError in every
    method that talks to it. TypeError is raised for an argument of another type than is said.
    """

    def __init__(
        self, opsqueue_url: str, object_store_url: str, *, object_store_options: Sequence[tuple[str, str]] = []
    ) -> None:
        self.inner: opsqueue_internal.ConsumerClient = opsqueue_internal.ConsumerClient(
            opsqueue_url, object_store_url, object_store_options
        )

    def run_each_op(
        self,
        op_callback: Callable[[Any], Any],
        *,
        strategy: Strategy = Strategy.Random(),  # noqa: B008  # frozen
        serialization_format: SerializationFormat = DEFAULT_SERIALIZATION_FORMAT,
        prefetch: int | None = None,
    ) -> None:
        """Calls `op_callback` with each operation of one chunk after the other, for ever; what it gives is the result.

        An exception from it fails the chunk, and the loop goes on. KeyboardInterrupt ends the loop, which then returns;
        every other BaseException is raised. Either way the chunk in hand goes back to be worked on by another.
        While the callback runs, the next chunks are reserved and fetched and the last results stored, as far as that
        takes no work from idle consumers. `prefetch`: chunks ahead at most, 32 unless said; 0 is one at a time.
        A chunk that cannot be fetched, decoded, encoded or stored is failed with the reason.
        `chunk_context()` tells the callback whether its chunk is still wanted; RetryLater and FailSubmission, raised
        from it, do what they say. `stop` ends the loop after the chunk in hand.
        """
        check_plain(op_callback, "op_callback")

        def run_all(ops: Sequence[Any], _chunk: Chunk) -> list[Any]:
            return [op_callback(op) for op in ops]

        self.run_each_chunk(run_all, strategy=strategy, serialization_format=serialization_format, prefetch=prefetch)

    def run_each_chunk(
        self,
        chunk_callback: Callable[[Any, Chunk], Sequence[Any]],
        *,
        strategy: Strategy = Strategy.Random(),  # noqa: B008  # frozen
        serialization_format: SerializationFormat = DEFAULT_SERIALIZATION_FORMAT,
        prefetch: int | None = None,
    ) -> None:
        """As `run_each_op`, but calls `chunk_callback(operations, chunk)`, which gives all results of the chunk.

        Both are sequences: the operations as the producer gave them, the results one for each, in the same order.
        """
        check_plain(chunk_callback, "chunk_callback")

        def run(chunk: Chunk) -> bytes:
            with spans.running_chunk(chunk):
                ops = packing.decoded_input(chunk, serialization_format)
                return packing.encoded_results(chunk_callback(ops, chunk), chunk, serialization_format)

        self.run_each_chunk_raw(run, strategy=strategy, prefetch=prefetch)

    def run_each_chunk_raw(
        self,
        chunk_callback: Callable[[Chunk], BytesLike],
        *,
        strategy: Strategy = Strategy.Random(),  # noqa: B008  # frozen
        prefetch: int | None = None,
    ) -> None:
        """As `run_each_chunk`, of bytes: `chunk.input_content` in, any bytes-like object out; opens no span."""
        check_plain(chunk_callback, "chunk_callback")
        self.inner.run_per_chunk(strategy, chunk_callback, prefetch)

    def stop(self) -> None:
        """Ends this client's loops, each after its chunk in hand, and those to come; what was reserved ahead goes back.

        Thread-safe, and may be called by a signal handler: `signal.signal(SIGTERM, lambda *_: client.stop())`.
        """
        self.inner.stop()

    def reserve_chunks(self, max: int = 1, strategy: Strategy = Strategy.Newest()) -> list[Chunk]:  # noqa: B008
        """Waits until there is work, then gives what there is, 1 to `max` chunks.

        Each is to be reported by `complete_chunk` or `fail_chunk` before the server's reservation time is over, else it
        is handed out again. A chunk whose input cannot be fetched is failed. Raises IncorrectUsageError for `max` below
        1, ChunkRetrievalError when no chunk is left.
        """
        return self.inner.reserve_chunks(max, strategy)

    def complete_chunk(
        self,
        submission_id: SubmissionId,
        submission_prefix: str | None,
        chunk_index: ChunkIndex,
        output_content: BytesLike,
    ) -> None:
        """Stores a chunk's result and reports the chunk as done. Raises ChunkStorageError, InternalConsumerClientError.

        `output_content` is bytes or the like: the results as `encode_chunk` gives them. `submission_prefix` is the
        chunk's. Reporting on a chunk that has expired, is done or whose submission has ended does nothing.
        """
        self.inner.complete_chunk(submission_id, submission_prefix, chunk_index, output_content)

    def fail_chunk(
        self, submission_id: SubmissionId, submission_prefix: str | None, chunk_index: ChunkIndex, failure: str
    ) -> None:
        """Reports a chunk as failed, with a text for people. Raises InternalConsumerClientError."""
        self.inner.fail_chunk(submission_id, submission_prefix, chunk_index, failure)
