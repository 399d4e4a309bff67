"""How chunks of operations become bytes and come back. Knows nothing of queues and stores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import cbor2

__all__ = ["DEFAULT_SERIALIZATION_FORMAT", "SerializationFormat", "decode_chunk", "encode_chunk", "json_as_bytes"]


@runtime_checkable
class SerializationFormat(Protocol):
    """Any module or object with `dumps` and `loads`: `cbor2`, `pickle`, `json_as_bytes`, or one of your own."""

    def dumps(self, obj: Any) -> bytes:
        """`obj`, a tuple of operations, as bytes."""

    def loads(self, data: bytes) -> Any:
        """The sequence of operations that `dumps` wrote."""


class json_as_bytes:  # a name that programs import
    """JSON in UTF-8 as a serialization format; `json` itself gives text."""

    @classmethod
    def dumps(cls, obj: Any) -> bytes:
        """`obj` as JSON."""
        return json.dumps(obj).encode()

    @classmethod
    def loads(cls, data: bytes) -> Any:
        """The value of the JSON in `data`."""
        return json.loads(data)


#: The format of a call that names none.
DEFAULT_SERIALIZATION_FORMAT: SerializationFormat = cast("SerializationFormat", cbor2)


def encode_chunk(chunk: Sequence[Any], serialization_format: SerializationFormat) -> bytes:
    """A chunk's operations as bytes. What `dumps` raises reaches the caller."""
    return serialization_format.dumps(chunk)


def decode_chunk(chunk: bytes, serialization_format: SerializationFormat) -> Sequence[Any]:
    """A chunk's operations. Raises AssertionError unless the bytes hold a sequence; what `loads` raises passes."""
    ops = serialization_format.loads(chunk)
    if not isinstance(ops, Sequence):
        raise AssertionError(f"a chunk must hold a sequence of operations, this one holds a {type(ops).__name__}")
    return ops
