"""How operations become bytes and come back: formats, codecs for classes of your own, compression.

`cbor` (the default), `json` and `msgpack` are formats to be given to a call as `serialization_format`; so is any other
object with `dumps` and `loads`.
"""

from opsqueue.serialization.cbor_format import CborFormat, Codec, cbor, register_codec
from opsqueue.serialization.chunks import DEFAULT_SERIALIZATION_FORMAT, decode_chunk, encode_chunk, packed_chunks
from opsqueue.serialization.compression import Compression, check_compression, compression_of
from opsqueue.serialization.formats import SerializationFormat
from opsqueue.serialization.json_format import json
from opsqueue.serialization.msgpack_format import msgpack

__all__ = [
    "DEFAULT_SERIALIZATION_FORMAT",
    "CborFormat",
    "Codec",
    "Compression",
    "SerializationFormat",
    "cbor",
    "check_compression",
    "compression_of",
    "decode_chunk",
    "encode_chunk",
    "json",
    "msgpack",
    "packed_chunks",
    "register_codec",
]
