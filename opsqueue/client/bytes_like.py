"""Chunks as programs give them: bytes, or what can stand for bytes."""

from __future__ import annotations

from typing import TypeAlias

#: What a type checker takes; whatever else has a buffer, such as a numpy array, does at run time.
BytesLike: TypeAlias = bytes | bytearray | memoryview


def content_of(given: BytesLike, what: str) -> bytes:
    """The bytes of any bytes-like object. Raises TypeError for anything else, which says `what` it is."""
    if isinstance(given, bytes):
        return given
    try:
        return memoryview(given).tobytes()
    except TypeError as error:
        raise TypeError(f"{what} must be bytes, not {given!r:.100}") from error
