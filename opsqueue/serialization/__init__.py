"""How operations become bytes and come back: formats, codecs for classes of your own, compression.

`cbor` (the default), `json` and `msgpack` are formats to be given to a call as `serialization_format`; so is any other
object with `dumps` and `loads`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opsqueue.serialization.cbor_format import CborFormat, Codec, cbor, register_codec
from opsqueue.serialization.chunks import DEFAULT_SERIALIZATION_FORMAT, decode_chunk, encode_chunk
from opsqueue.serialization.compression import Compression
from opsqueue.serialization.formats import SerializationFormat

if TYPE_CHECKING:
    from opsqueue.serialization.json_format import json as json
    from opsqueue.serialization.msgpack_format import msgpack as msgpack

__all__ = [
    "DEFAULT_SERIALIZATION_FORMAT",
    "CborFormat",
    "Codec",
    "Compression",
    "SerializationFormat",
    "cbor",
    "decode_chunk",
    "encode_chunk",
    "json",
    "msgpack",
    "register_codec",
]


def __getattr__(name: str) -> SerializationFormat:
    # most programs use neither, and each takes its time to load
    if name == "json":
        from opsqueue.serialization.json_format import json

        return json
    if name == "msgpack":
        from opsqueue.serialization.msgpack_format import msgpack

        return msgpack
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
