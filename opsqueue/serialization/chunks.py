"""How chunks of operations become bytes and come back. Knows nothing of queues and stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

import cbor2

from opsqueue.exceptions import DeserializationError, SerializationError
from opsqueue.serialization.cbor_format import cbor
from opsqueue.serialization.compression import Compression, compress, compression_of, decompress
from opsqueue.serialization.formats import SerializationFormat

__all__ = ["DEFAULT_SERIALIZATION_FORMAT", "decode_chunk", "encode_chunk"]

#: The format of a call that names none. `encode_chunk` and `decode_chunk` use `opsqueue.serialization.cbor` for it.
DEFAULT_SERIALIZATION_FORMAT: Final[SerializationFormat] = cast("SerializationFormat", cbor2)


def encode_chunk(
    chunk: Sequence[Any],
    serialization_format: SerializationFormat,
    compression: Compression | None = None,
    *,
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
        found = _first_unfit(chunk, serialization_format, first_index)
        if found is None:
            raise
        raise found from (found.__cause__ or error.__cause__)
    # what only looks like a compressed chunk is compressed too: it has to come back as it was
    if compression is None and compression_of(data) is None:
        return data
    return compress(data)


def decode_chunk(
    chunk: bytes,
    serialization_format: SerializationFormat,
    *,
    max_decompressed: int | None = None,
    name: str | None = None,
) -> Sequence[Any]:
    """A chunk's operations, of a compressed one too; `max_decompressed` is in bytes, None for the process's limit.

    Raises DecompressionError for a broken or too large compressed chunk, and AssertionError unless the bytes hold a
    sequence; what `loads` raises passes. Each says the chunk's `name`, if given, in its text or in a note.
    """
    if serialization_format is DEFAULT_SERIALIZATION_FORMAT:
        serialization_format = cbor
    try:
        if compression_of(chunk) is not None:
            chunk = decompress(chunk, max_decompressed)
        ops = serialization_format.loads(chunk)
        if type(ops) is not list and not isinstance(ops, Sequence):  # the first is 300 ns faster
            raise AssertionError(f"a chunk must hold a sequence of operations, this one holds a {type(ops).__name__}")
    except DeserializationError as error:
        error.chunk = name
        raise
    except Exception as error:
        if name is not None:
            error.add_note(f"{name} could not be decoded")
        raise
    return ops


def _first_unfit(
    chunk: Sequence[Any], serialization_format: SerializationFormat, first_index: int
) -> SerializationError | None:
    """What is wrong with the first operation that cannot be encoded by itself, if there is one."""
    if not isinstance(chunk, Sequence):
        return None
    for index, operation in enumerate(chunk, first_index):
        try:
            serialization_format.dumps((operation,))
        except SerializationError as error:
            found = SerializationError(error.reason, index)
            found.__cause__ = error.__cause__
            return found
    return None
