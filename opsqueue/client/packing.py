"""Operations into encoded chunks and back, for iterables of both kinds. Does no I/O."""

from __future__ import annotations

import operator
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from opsqueue.client.values import Chunk
from opsqueue.serialization import Compression, SerializationFormat, decode_chunk, encode_chunk
from opsqueue.serialization.compression import check_compression, compression_of

T = TypeVar("T")


class ChunkSizeIsZeroError(Exception):
    """chunk_size must be at least 1."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "chunk_size must be at least 1"


ChunkSizeIsZeroError.__module__ = "opsqueue.producer"  # where programs know it


def _check(chunk_size: int) -> None:
    try:
        operator.index(chunk_size)
    except TypeError as error:
        raise TypeError(f"chunk_size must be an int, not {chunk_size!r}") from error
    if chunk_size <= 0:
        raise ChunkSizeIsZeroError(f"chunk_size must be at least 1, it is {chunk_size}")


def packed(
    ops: Iterable[Any],
    chunk_size: int,
    serialization_format: SerializationFormat,
    compression: Compression | None = None,
) -> Iterator[bytes]:
    """Chunks of `chunk_size` operations. Raises ChunkSizeIsZeroError before the first operation is taken."""
    # not a generator itself, for the same reason
    _check(chunk_size)
    check_compression(compression)
    return _chunks(iter(ops), chunk_size, serialization_format, compression)


def _chunks(
    ops: Iterator[Any],
    chunk_size: int,
    serialization_format: SerializationFormat,
    compression: Compression | None,
) -> Iterator[bytes]:
    first = 0
    while chunk := tuple(islice(ops, chunk_size)):
        yield encode_chunk(chunk, serialization_format, compression, first_index=first)
        first += chunk_size


def packed_async(
    ops: Iterable[Any] | AsyncIterable[Any],
    chunk_size: int,
    serialization_format: SerializationFormat,
    compression: Compression | None = None,
) -> AsyncIterator[bytes]:
    """As `packed`, of an iterable of either kind."""
    _check(chunk_size)
    check_compression(compression)
    if isinstance(ops, AsyncIterable):
        return _chunks_async(ops, chunk_size, serialization_format, compression)
    return as_async(_chunks(iter(ops), chunk_size, serialization_format, compression))


async def _chunks_async(
    ops: AsyncIterable[Any],
    chunk_size: int,
    serialization_format: SerializationFormat,
    compression: Compression | None,
) -> AsyncIterator[bytes]:
    chunk: list[Any] = []
    first = 0
    async for op in ops:
        chunk.append(op)
        if len(chunk) == chunk_size:
            yield encode_chunk(tuple(chunk), serialization_format, compression, first_index=first)
            first += chunk_size
            chunk.clear()
    if chunk:
        yield encode_chunk(tuple(chunk), serialization_format, compression, first_index=first)


async def as_async(items: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[T]:
    """The same items, for `async for`."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


def result_name(index: int) -> str:
    """What errors call the result of a chunk."""
    return f"the result of chunk {index}"


def unpacked(chunks: Iterable[bytes], serialization_format: SerializationFormat) -> Iterator[Any]:
    """The operations of encoded chunks, which come in order from the first."""
    for index, chunk in enumerate(chunks):
        yield from decode_chunk(chunk, serialization_format, name=result_name(index))


async def unpacked_async(chunks: AsyncIterator[bytes], serialization_format: SerializationFormat) -> AsyncIterator[Any]:
    """As `unpacked`."""
    index = 0
    async for chunk in chunks:
        for result in decode_chunk(chunk, serialization_format, name=result_name(index)):
            yield result
        index += 1


def decoded_input(chunk: Chunk, serialization_format: SerializationFormat) -> Sequence[Any]:
    """The operations of a chunk that a consumer has reserved."""
    name = f"chunk {chunk.chunk_index.id} of submission {chunk.submission_id.id}"
    return decode_chunk(chunk.input_content, serialization_format, name=name)


def encoded_results(results: Sequence[Any], chunk: Chunk, serialization_format: SerializationFormat) -> bytes:
    """What a callback gave for `chunk`, compressed if its operations were."""
    return encode_chunk(results, serialization_format, compression_of(chunk.input_content))
