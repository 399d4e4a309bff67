"""The names of serialization that programs import; the code is in `opsqueue.serialization`."""

from __future__ import annotations

import json
from typing import Any

from opsqueue.serialization import (
    DEFAULT_SERIALIZATION_FORMAT,
    SerializationFormat,
    decode_chunk,
    encode_chunk,
    register_codec,
)

__all__ = [
    "DEFAULT_SERIALIZATION_FORMAT",
    "SerializationFormat",
    "decode_chunk",
    "encode_chunk",
    "json_as_bytes",
    "register_codec",
]


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
