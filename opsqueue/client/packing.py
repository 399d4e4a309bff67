"""Operations into encoded chunks and back, for iterables of both kinds. Does no I/O."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from opsqueue.common import SerializationFormat, decode_chunk, encode_chunk

T = TypeVar("T")


class ChunkSizeIsZeroError(Exception):
    """chunk_size must be at least 1."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "chunk_size must be at least 1"


ChunkSizeIsZeroError.__module__ = "opsqueue.producer"  # where programs know it


def _check(chunk_size: int) -> None:
    if chunk_size <= 0:
        raise ChunkSizeIsZeroError(f"chunk_size must be at least 1, it is {chunk_size}")


def packed(ops: Iterable[Any], chunk_size: int, serialization_format: SerializationFormat) -> Iterator[bytes]:
    """Chunks of `chunk_size` operations. Raises ChunkSizeIsZeroError before the first operation is taken."""
    # not a generator itself, for the same reason
    _check(chunk_size)
    return _chunks(iter(ops), chunk_size, serialization_format)


def _chunks(ops: Iterator[Any], chunk_size: int, serialization_format: SerializationFormat) -> Iterator[bytes]:
    while chunk := tuple(islice(ops, chunk_size)):
        yield encode_chunk(chunk, serialization_format)


def packed_async(
    ops: Iterable[Any] | AsyncIterable[Any], chunk_size: int, serialization_format: SerializationFormat
) -> AsyncIterator[bytes]:
    """As `packed`, of an iterable of either kind."""
    _check(chunk_size)
    if isinstance(ops, AsyncIterable):
        return _chunks_async(ops, chunk_size, serialization_format)
    return as_async(_chunks(iter(ops), chunk_size, serialization_format))


async def _chunks_async(
    ops: AsyncIterable[Any], chunk_size: int, serialization_format: SerializationFormat
) -> AsyncIterator[bytes]:
    chunk: list[Any] = []
    async for op in ops:
        chunk.append(op)
        if len(chunk) == chunk_size:
            yield encode_chunk(tuple(chunk), serialization_format)
            chunk.clear()
    if chunk:
        yield encode_chunk(tuple(chunk), serialization_format)


async def as_async(items: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[T]:
    """The same items, for `async for`."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


def unpacked(chunks: Iterable[bytes], serialization_format: SerializationFormat) -> Iterator[Any]:
    """The operations of encoded chunks."""
    for chunk in chunks:
        yield from decode_chunk(chunk, serialization_format)


async def unpacked_async(chunks: AsyncIterator[bytes], serialization_format: SerializationFormat) -> AsyncIterator[Any]:
    """As `unpacked`."""
    async for chunk in chunks:
        for result in decode_chunk(chunk, serialization_format):
            yield result
