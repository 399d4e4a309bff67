"""How chunks of operations become bytes and come back. Knows nothing of queues and stores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, cast

import cbor2

from opsqueue.exceptions import SerializationError
from opsqueue.serialization.cbor_format import cbor
from opsqueue.serialization.compression import DEFAULT_LEVEL, Compression, compress, compression_of, decompress
from opsqueue.serialization.formats import SerializationFormat

__all__ = ["DEFAULT_SERIALIZATION_FORMAT", "decode_chunk", "encode_chunk", "packed_chunks"]

#: The format of a call that names none. `encode_chunk` and `decode_chunk` use `opsqueue.serialization.cbor` for it.
DEFAULT_SERIALIZATION_FORMAT: Final[SerializationFormat] = cast("SerializationFormat", cbor2)


def encode_chunk(
    chunk: Sequence[Any],
    serialization_format: SerializationFormat,
    compression: Compression | None = None,
    *,
    level: int = DEFAULT_LEVEL,
    first_index: int = 0,
) -> bytes:
    """A chunk's operations as bytes, compressed when that is asked for.

    Raises SerializationError for an operation that one of our formats cannot write; its `index` is `first_index` plus
    the operation's place in the chunk. What another format's `dumps` raises reaches the caller as it is.
    """
    if serialization_format is DEFAULT_SERIALIZATION_FORMAT:
        serialization_format = cbor
    try:
        data = serialization_format.dumps(chunk)
    except SerializationError as error:
        _raise_with_index(error, chunk, serialization_format, first_index)
        raise
    # what only looks like a compressed chunk is compressed too: it has to come back as it was
    if compression is None and compression_of(data) is None:
        return data
    return compress(data, level)


def decode_chunk(
    chunk: bytes, serialization_format: SerializationFormat, *, max_decompressed: int | None = None
) -> Sequence[Any]:
    """A chunk's operations, of a compressed one too; `max_decompressed` is in bytes, None for the process's limit.

    Raises DecompressionError for a broken or too large compressed chunk, and AssertionError unless the bytes hold a
    sequence; what `loads` raises passes.
    """
    if serialization_format is DEFAULT_SERIALIZATION_FORMAT:
        serialization_format = cbor
    if compression_of(chunk) is not None:
        chunk = decompress(chunk, max_decompressed)
    ops = serialization_format.loads(chunk)
    if type(ops) is not list and not isinstance(ops, Sequence):  # the first is 300 ns faster
        raise AssertionError(f"a chunk must hold a sequence of operations, this one holds a {type(ops).__name__}")
    return ops


def packed_chunks(
    ops: Iterable[Any],
    chunk_size: int,
    serialization_format: SerializationFormat,
    compression: Compression | None = None,
    *,
    level: int = DEFAULT_LEVEL,
) -> Iterator[bytes]:
    """`ops` in encoded chunks of `chunk_size`, the last one of what is left. Raises as `encode_chunk`, lazily."""
    taking = iter(ops)
    first_index = 0
    while chunk := tuple(islice(taking, chunk_size)):
        yield encode_chunk(chunk, serialization_format, compression, level=level, first_index=first_index)
        first_index += chunk_size


def _raise_with_index(
    error: SerializationError, chunk: Sequence[Any], serialization_format: SerializationFormat, first_index: int
) -> None:
    """Raises `error` anew with the first operation that has it; returns when none has it by itself."""
    if not isinstance(chunk, Sequence):
        return
    for index, operation in enumerate(chunk, first_index):
        try:
            serialization_format.dumps((operation,))
        except SerializationError as found:
            raise SerializationError(found.reason, index) from (found.__cause__ or error.__cause__)
