"""Compressed chunks: 8 bytes that say so, then one zstd frame. Bounds what comes out of one."""

from __future__ import annotations

import os
from typing import Final, Literal

from opsqueue.exceptions import DecompressionError, IncorrectUsageError, SerializationError

__all__ = [
    "DEFAULT_MAX_DECOMPRESSED_BYTES",
    "MAGIC",
    "MAX_DECOMPRESSED_VARIABLE",
    "Compression",
    "check_compression",
    "compress",
    "compression_of",
    "decompress",
    "max_decompressed_bytes",
]

#: The ways in which a chunk can be compressed.
Compression = Literal["zstd"]

#: A compressed chunk begins with these 8 bytes.
MAGIC: Final = b"\x89OPSQZ1\n"

#: zstd's own default: a few hundred MB/s.
_LEVEL: Final = 3

#: What a compressed chunk may hold unless the environment says otherwise: 1 GiB.
DEFAULT_MAX_DECOMPRESSED_BYTES: Final = 1 << 30

#: The environment variable that sets the limit, in bytes.
MAX_DECOMPRESSED_VARIABLE: Final = "OPSQUEUE_MAX_DECOMPRESSED_BYTES"

_FRAME_MAGIC: Final = b"\x28\xb5\x2f\xfd"  # RFC 8878, 3.1.1


def check_compression(compression: str | None) -> None:
    """Raises IncorrectUsageError unless chunks can be compressed so."""
    if compression is not None and compression != "zstd":
        raise IncorrectUsageError(f'compression must be "zstd" or None, not {compression!r}')


def compress(data: bytes) -> bytes:
    """`data` as a compressed chunk. Raises SerializationError for one that no reader would take for its size."""
    limit = max_decompressed_bytes()
    if len(data) > limit:
        raise SerializationError(
            f"a chunk of {len(data)} bytes is over the limit of {limit} for compressed ones; make chunk_size smaller, "
            f"or set {MAX_DECOMPRESSED_VARIABLE} here and for the consumers"
        )
    from opsqueue.serialization.zstd_library import zstd  # most programs never compress

    options: dict[int, int] = {
        zstd.CompressionParameter.compression_level: _LEVEL,
        zstd.CompressionParameter.checksum_flag: 1,
    }
    return MAGIC + zstd.compress(data, options=options)


def compression_of(chunk: bytes) -> Compression | None:
    """How a stored chunk is compressed; None when it is not."""
    return "zstd" if chunk[:8] == MAGIC else None


def decompress(chunk: bytes, limit: int | None = None) -> bytes:
    """What `compress` was given; `limit` bytes at most, or as many as `max_decompressed_bytes` says.

    Never holds more than the limit, whatever the frame says of its size. Raises DecompressionError when the chunk is
    no such one, is cut off, broken, followed by something, or over the limit.
    """
    limit = max_decompressed_bytes() if limit is None else limit
    if compression_of(chunk) is None:
        raise DecompressionError("it does not begin as a compressed chunk does")
    frame = memoryview(chunk)[len(MAGIC) :]
    if frame[:4] != _FRAME_MAGIC[: len(frame)]:
        raise DecompressionError("no zstd frame follows its first 8 bytes")
    from opsqueue.serialization.zstd_library import zstd

    decompressor = zstd.ZstdDecompressor()
    try:
        data = decompressor.decompress(frame, limit + 1)
    except zstd.ZstdError as error:
        raise DecompressionError(f"its zstd frame is broken: {error}") from error
    if len(data) > limit:
        raise DecompressionError(f"it holds more than {limit} bytes; {MAX_DECOMPRESSED_VARIABLE} sets that limit")
    if not decompressor.eof:
        raise DecompressionError(f"its zstd frame is cut off after {len(frame)} bytes")
    if decompressor.unused_data:
        raise DecompressionError(f"{len(decompressor.unused_data)} bytes follow its zstd frame")
    return data


def max_decompressed_bytes() -> int:
    """The limit that holds in this process. Raises IncorrectUsageError when the environment has no number for it."""
    text = os.environ.get(MAX_DECOMPRESSED_VARIABLE)
    if text is None:
        return DEFAULT_MAX_DECOMPRESSED_BYTES
    if not text.isdecimal():
        raise IncorrectUsageError(f"{MAX_DECOMPRESSED_VARIABLE} must be a number of bytes, not {text!r}")
    return int(text)
