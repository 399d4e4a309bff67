"""From an insert's JSON body and headers to the writer's request: limits, defaults, fingerprint. Does no I/O."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec
from multidict import CIMultiDictProxy

from opsqueue.protocol.producer import Direct, InsertSubmission, SeeObjectStorage
from opsqueue.server import requests
from opsqueue.server.frontend import errors
from opsqueue.server.frontend.tracing import carrier_from_headers
from opsqueue.server.settings import Settings

#: Bytes of an Idempotency-Key.
MAX_KEY_BYTES = 255

_canonical = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True, slots=True)
class InsertLimits:
    """What one submission may be; each is a setting of the same name. Sizes in bytes."""

    max_metadata_size: int
    max_strategic_keys: int
    max_strategic_key_size: int
    max_prefix_size: int
    max_direct_content_size: int
    memory_limit: int

    @classmethod
    def of(cls, settings: Settings) -> InsertLimits:
        """The limits as configured."""
        return cls(
            max_metadata_size=settings.max_metadata_size,
            max_strategic_keys=settings.max_strategic_keys,
            max_strategic_key_size=settings.max_strategic_key_size,
            max_prefix_size=settings.max_prefix_size,
            max_direct_content_size=settings.max_direct_content_size,
            memory_limit=settings.memory_limit,
        )


def fingerprint(
    count: int, contents: list[bytes] | None, chunk_size: int, metadata: bytes | None, strategic: dict[str, int]
) -> bytes:
    """16 bytes that are equal for two inserts of the same thing; the trace carrier and `paused` do not count."""
    what = count if contents is None else contents
    canonical = _canonical([what, chunk_size, metadata, sorted(strategic.items())])
    return hashlib.blake2b(canonical, digest_size=16).digest()


def to_request(body: InsertSubmission, headers: CIMultiDictProxy[str], limits: InsertLimits) -> requests.Insert:
    """The writer's request for `body`. Raises HttpError: 422 above a part's limit, 413 for a count that never fits."""
    metadata = None if body.metadata is None else bytes(body.metadata)
    if metadata is not None and len(metadata) > limits.max_metadata_size:
        raise errors.wrong_shape(
            f"metadata has {len(metadata)} bytes, it may have {limits.max_metadata_size} (--max-metadata-size)"
        )
    _check_strategic(body.strategic_metadata, limits)
    chunk_size = 1 if body.chunk_size is None else body.chunk_size
    prefix: str | None = None
    contents: list[bytes] | None = None
    match body.chunk_contents:
        case SeeObjectStorage(prefix=prefix, count=count):
            _check_prefix(prefix, limits)
        case Direct(contents=given):
            contents = [b"" if content is None else bytes(content) for content in given]
            count = len(contents)
            _check_contents(contents, limits)
    check_count(count, limits)
    return requests.Insert(
        prefix=prefix,
        count=count,
        contents=contents,
        idempotency_key=_idempotency_key(headers),
        fingerprint=fingerprint(count, contents, chunk_size, metadata, body.strategic_metadata),
        chunk_size=chunk_size,
        metadata=metadata,
        strategic_metadata=body.strategic_metadata,
        otel_trace_carrier=carrier_from_headers(headers),
        paused=body.paused,
    )


def may_repeat(insert: requests.Insert) -> bool:
    """Whether sending it twice makes one submission: the journal knows it by its prefix or key."""
    return insert.prefix is not None or insert.idempotency_key is not None


def _check_strategic(strategic: dict[str, int], limits: InsertLimits) -> None:
    if len(strategic) > limits.max_strategic_keys:
        raise errors.wrong_shape(
            f"strategic_metadata has {len(strategic)} keys, "
            f"it may have {limits.max_strategic_keys} (--max-strategic-keys)"
        )
    for name in strategic:
        if len(name.encode()) > limits.max_strategic_key_size:
            raise errors.wrong_shape(
                f"the strategic_metadata key {name[:40]!r}… has {len(name.encode())} bytes, "
                f"it may have {limits.max_strategic_key_size} (--max-strategic-key-size)"
            )


def _check_prefix(prefix: str, limits: InsertLimits) -> None:
    size = len(prefix.encode())
    if size > limits.max_prefix_size:
        raise errors.wrong_shape(f"prefix has {size} bytes, it may have {limits.max_prefix_size} (--max-prefix-size)")


def _check_contents(contents: list[bytes], limits: InsertLimits) -> None:
    for index, content in enumerate(contents):
        if len(content) > limits.max_direct_content_size:
            raise errors.wrong_shape(
                f"content {index} of chunk_contents.Direct has {len(content)} bytes, it may have "
                f"{limits.max_direct_content_size} (--max-direct-content-size); put larger ones into the object store"
            )


def check_count(count: int, limits: InsertLimits) -> None:
    """Raises HttpError 413 for so many chunks as never fit into the memory limit."""
    needed = requests.worst_case_bytes(count)
    if needed > limits.memory_limit:
        raise errors.too_large(
            f"{count} chunks may need {needed} bytes of the server's memory, it may use {limits.memory_limit} "
            "(--memory-limit); use larger chunks, or several submissions"
        )


def _idempotency_key(headers: CIMultiDictProxy[str]) -> str | None:
    key = headers.get("Idempotency-Key")
    if key is None:
        return None
    if not key or len(key) > MAX_KEY_BYTES or not key.isascii():
        raise errors.wrong_shape(f"the Idempotency-Key header must be 1 to {MAX_KEY_BYTES} ASCII characters")
    return key
