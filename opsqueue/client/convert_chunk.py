"""From a reserved chunk as the protocol has it to the one that callbacks see. No I/O, no decisions."""

from __future__ import annotations

from opsqueue.client import values
from opsqueue.client.convert import carrier
from opsqueue.client.values import ChunkIndex, SubmissionId
from opsqueue.protocol import consumer as wire


def chunk(found: wire.Chunk, of: wire.Submission, content: bytes) -> values.Chunk:
    """A reserved chunk with its input."""
    return values.Chunk(
        submission_id=SubmissionId(found.submission_id),
        chunk_index=ChunkIndex(found.chunk_index),
        input_content=content,
        retries=found.retries,
        submission_prefix=of.prefix,
        submission_metadata=of.metadata,
        submission_otel_trace_carrier=carrier(of.otel_trace_carrier),
    )
