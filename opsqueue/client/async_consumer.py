"""AsyncConsumerClient: the consumer's client for programs that run on asyncio or uvloop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Final, Self

from opsqueue.client import packing, spans
from opsqueue.client.async_raw_consumer import AsyncRawConsumer
from opsqueue.client.bytes_like import BytesLike
from opsqueue.client.callbacks import check_callable
from opsqueue.client.values import Chunk, Strategy
from opsqueue.common import DEFAULT_SERIALIZATION_FORMAT, SerializationFormat

#: Chunks in hand at a time, unless the caller says otherwise.
CONCURRENCY: Final = 16


class AsyncConsumerClient:
    """Works on chunks with coroutines, several at a time, over one connection; no thread per call.

    Arguments and errors as `ConsumerClient` has them. To be used on one event loop; `async with` closes it at the end.
    While a chunk is in hand its reservation is extended where the server offers that.
    """

    def __init__(
        self, opsqueue_url: str, object_store_url: str, *, object_store_options: Sequence[tuple[str, str]] = []
    ) -> None:
        self.inner: AsyncRawConsumer = AsyncRawConsumer(opsqueue_url, object_store_url, object_store_options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; what is held goes back to the server without a retry."""
        await self.inner.close()

    def stop(self) -> None:
        """Ends this client's loops, each after the chunks in hand. To be called on the event loop's thread."""
        self.inner.stop()

    async def run_each_op(
        self,
        op_callback: Callable[[Any], Awaitable[Any]],
        *,
        strategy: Strategy = Strategy.Random(),  # noqa: B008  # frozen
        serialization_format: SerializationFormat = DEFAULT_SERIALIZATION_FORMAT,
        concurrency: int = CONCURRENCY,
    ) -> None:
        """Awaits `op_callback` for each operation of a chunk, one after the other; `concurrency` chunks at a time.

        An exception from it fails the chunk, and the loop goes on. Runs until `stop`, or until it is cancelled: chunks
        in hand then go back without a retry. Raises InternalConsumerClientError for a server that does not speak the
        protocol, TypeError for a `concurrency` that is no number from 1.
        """
        check_callable(op_callback, "op_callback")

        async def run_all(ops: Sequence[Any], _chunk: Chunk) -> list[Any]:
            return [await op_callback(op) for op in ops]

        await self.run_each_chunk(
            run_all, strategy=strategy, serialization_format=serialization_format, concurrency=concurrency
        )

    async def run_each_chunk(
        self,
        chunk_callback: Callable[[Any, Chunk], Awaitable[Sequence[Any]]],
        *,
        strategy: Strategy = Strategy.Random(),  # noqa: B008  # frozen
        serialization_format: SerializationFormat = DEFAULT_SERIALIZATION_FORMAT,
        concurrency: int = CONCURRENCY,
    ) -> None:
        """As `run_each_op`, but awaits `chunk_callback(operations, chunk)`, which gives all results of the chunk."""
        check_callable(chunk_callback, "chunk_callback")

        async def run(chunk: Chunk) -> bytes:
            with spans.running_chunk(chunk):
                ops = packing.decoded_input(chunk, serialization_format)
                return packing.encoded_results(await chunk_callback(ops, chunk), chunk, serialization_format)

        await self.run_each_chunk_raw(run, strategy=strategy, concurrency=concurrency)

    async def run_each_chunk_raw(
        self,
        chunk_callback: Callable[[Chunk], Awaitable[BytesLike]],
        *,
        strategy: Strategy = Strategy.Random(),  # noqa: B008  # frozen
        concurrency: int = CONCURRENCY,
    ) -> None:
        """As `run_each_chunk`, of bytes: `chunk.input_content` in, any bytes-like object out; opens no span."""
        check_callable(chunk_callback, "chunk_callback")
        await self.inner.run_per_chunk(strategy, chunk_callback, concurrency)
