"""A submission's description as consumers get it: CBOR before and after the one value that changes, chunks_done."""

from __future__ import annotations

from collections.abc import Callable

import cbor2

from opsqueue.server.reader import Description

_FIELDS = 8


def _pairs(**values: object) -> bytes:
    return b"".join(cbor2.dumps(name) + cbor2.dumps(value) for name, value in values.items())


def around_chunks_done(submission: int, description: Description) -> tuple[bytes, bytes]:
    """The CBOR map of an unfinished submission, split where the integer chunks_done belongs."""
    before = bytes([0xA0 + _FIELDS]) + _pairs(
        id=submission, prefix=description.prefix, chunks_total=description.chunks_total
    )
    after = _pairs(
        chunk_size=description.chunk_size,
        metadata=description.metadata,
        strategic_metadata=description.strategic_metadata,
        otel_trace_carrier=description.otel_trace_carrier,
    )
    return before + cbor2.dumps("chunks_done"), after


def describer(find: Callable[[int], Description | None]) -> Callable[[int], tuple[bytes, bytes] | None]:
    """`find`, giving the CBOR instead; None for an unknown submission."""

    def describe(submission: int) -> tuple[bytes, bytes] | None:
        description = find(submission)
        return None if description is None else around_chunks_done(submission, description)

    return describe
