"""A submission's status as JSON, from the writer's word or from the file's row. Asks nobody."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from opsqueue.protocol import producer as wire
from opsqueue.server import requests
from opsqueue.server.reader import Description, SubmissionStatus
from opsqueue.server.writer.batch import State

#: The states as a status and other answers name them.
STATE_NAMES = {
    State.IN_PROGRESS: "InProgress",
    State.PAUSED: "Paused",
    State.COMPLETED: "Completed",
    State.FAILED: "Failed",
    State.CANCELLED: "Cancelled",
}

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def unfinished(submission: int, description: Description, progress: requests.Progress) -> bytes:
    """`{"InProgress": S}` or `{"Paused": S}`."""
    described = wire.Submission(
        id=submission,
        prefix=description.prefix,
        chunks_total=description.chunks_total,
        chunks_done=progress.chunks_done,
        chunk_size=description.chunk_size,
        metadata=wire.as_array(description.metadata),
        strategic_metadata=description.strategic_metadata,
        otel_trace_carrier=description.otel_trace_carrier,
    )
    return wire.encode_status(wire.Paused(described) if progress.paused else wire.InProgress(described))


def ended(row: SubmissionStatus) -> bytes | None:
    """The status of a submission that has ended; None when it has not."""
    match row.state:
        case State.COMPLETED:
            return wire.encode_status(wire.Completed(_completed(row)))
        case State.FAILED:
            return wire.encode_status(_failed(row))
        case State.CANCELLED:
            return wire.encode_status(wire.Cancelled(_cancelled(row)))
        case State.IN_PROGRESS | State.PAUSED:
            return None


def _ended_at(row: SubmissionStatus) -> datetime:
    if row.ended_us is None:
        raise ValueError(f"submission {row.submission} is {row.state.name} in the file, without the time of its end")
    return _EPOCH + timedelta(microseconds=row.ended_us)


def _completed(row: SubmissionStatus) -> wire.SubmissionCompleted:
    return wire.SubmissionCompleted(
        id=row.submission,
        prefix=row.description.prefix,
        chunks_total=row.description.chunks_total,
        chunk_size=row.description.chunk_size,
        metadata=wire.as_array(row.description.metadata),
        strategic_metadata=row.description.strategic_metadata,
        completed_at=_ended_at(row),
        otel_trace_carrier=row.description.otel_trace_carrier,
    )


def _failed(row: SubmissionStatus) -> wire.Failed:
    if row.failed_chunk is None or row.failure is None:
        raise ValueError(f"submission {row.submission} is FAILED in the file, without its failed chunk")
    at = _ended_at(row)
    submission = wire.SubmissionFailed(
        id=row.submission,
        prefix=row.description.prefix,
        chunks_total=row.description.chunks_total,
        chunks_done=row.chunks_done,
        chunk_size=row.description.chunk_size,
        metadata=wire.as_array(row.description.metadata),
        strategic_metadata=row.description.strategic_metadata,
        failed_at=at,
        failed_chunk_id=row.failed_chunk,
        otel_trace_carrier=row.description.otel_trace_carrier,
    )
    chunk = wire.ChunkFailed(
        submission_id=row.submission,
        chunk_index=row.failed_chunk,
        input_content=wire.as_array(row.failed_chunk_input),
        failure=row.failure,
        failed_at=at,
    )
    return wire.Failed(submission, chunk)


def _cancelled(row: SubmissionStatus) -> wire.SubmissionCancelled:
    return wire.SubmissionCancelled(
        id=row.submission,
        prefix=row.description.prefix,
        chunks_total=row.description.chunks_total,
        chunks_done=row.chunks_done,
        metadata=wire.as_array(row.description.metadata),
        strategic_metadata=row.description.strategic_metadata,
        cancelled_at=_ended_at(row),
    )
