"""From the protocol's types to the values that users see. No I/O, no decisions."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from opsqueue.client import values
from opsqueue.client.values import ChunkIndex, SubmissionId, SubmissionNotCancellable, SubmissionStatus
from opsqueue.protocol import producer as wire
from opsqueue.protocol.producer import as_bytes

logger = logging.getLogger("opsqueue.client")


def carrier(text: str) -> dict[str, str]:
    """A trace carrier from its JSON text; one that cannot be read is as good as none."""
    if text == "{}":  # most are, and every chunk has one
        return {}
    try:
        loaded = json.loads(text)
    except ValueError:
        loaded = None
    if not isinstance(loaded, dict):
        logger.debug("ignoring a trace carrier that is no JSON object: %.200r", text)
        return {}
    return {name: value for name, value in loaded.items() if isinstance(value, str)}


def _utc(time: datetime) -> datetime:
    return time.astimezone(UTC)


def submission(found: wire.Submission) -> values.Submission:
    """A submission in progress."""
    return values.Submission(
        id=SubmissionId(found.id),
        chunks_total=found.chunks_total,
        chunks_done=found.chunks_done,
        metadata=as_bytes(found.metadata),
        strategic_metadata=found.strategic_metadata,
        prefix=found.prefix,
        chunk_size=found.chunk_size,
        otel_trace_carrier=carrier(found.otel_trace_carrier),
    )


def completed(found: wire.SubmissionCompleted) -> values.SubmissionCompleted:
    """A completed submission."""
    return values.SubmissionCompleted(
        id=SubmissionId(found.id),
        chunks_total=found.chunks_total,
        metadata=as_bytes(found.metadata),
        strategic_metadata=found.strategic_metadata,
        completed_at=_utc(found.completed_at),
        prefix=found.prefix,
        chunk_size=found.chunk_size,
        otel_trace_carrier=carrier(found.otel_trace_carrier),
    )


def failed(found: wire.SubmissionFailed) -> values.SubmissionFailed:
    """A failed submission."""
    return values.SubmissionFailed(
        id=SubmissionId(found.id),
        chunks_total=found.chunks_total,
        chunks_done=found.chunks_done,
        metadata=as_bytes(found.metadata),
        strategic_metadata=found.strategic_metadata,
        failed_at=_utc(found.failed_at),
        failed_chunk_id=found.failed_chunk_id,
        prefix=found.prefix,
        chunk_size=found.chunk_size,
        otel_trace_carrier=carrier(found.otel_trace_carrier),
    )


def cancelled(found: wire.SubmissionCancelled) -> values.SubmissionCancelled:
    """A cancelled submission."""
    return values.SubmissionCancelled(
        id=SubmissionId(found.id),
        chunks_total=found.chunks_total,
        chunks_done=found.chunks_done,
        metadata=as_bytes(found.metadata),
        strategic_metadata=found.strategic_metadata,
        cancelled_at=_utc(found.cancelled_at),
        prefix=found.prefix,
    )


def chunk_failed(found: wire.ChunkFailed) -> values.ChunkFailed:
    """The chunk that failed for good."""
    return values.ChunkFailed(
        submission_id=SubmissionId(found.submission_id),
        chunk_index=ChunkIndex(found.chunk_index),
        failure=found.failure,
        failed_at=_utc(found.failed_at),
    )


def status(found: wire.Status) -> values.SubmissionStatus:
    """A submission's status."""
    match found:
        case wire.InProgress():
            return SubmissionStatus.InProgress(submission(found.submission))
        case wire.Paused():
            return SubmissionStatus.Paused(submission(found.submission))
        case wire.Completed():
            return SubmissionStatus.Completed(completed(found.submission))
        case wire.Failed():
            return SubmissionStatus.Failed(failed(found.submission), chunk_failed(found.chunk))
        case wire.Cancelled():
            return SubmissionStatus.Cancelled(cancelled(found.submission))


def not_cancellable(found: wire.Ended) -> values.SubmissionNotCancellable:
    """Why a submission cannot be cancelled."""
    match found:
        case wire.Completed():
            return SubmissionNotCancellable.Completed(completed(found.submission))
        case wire.Failed():
            return SubmissionNotCancellable.Failed(failed(found.submission), chunk_failed(found.chunk))
        case wire.Cancelled():
            return SubmissionNotCancellable.Cancelled(cancelled(found.submission))
