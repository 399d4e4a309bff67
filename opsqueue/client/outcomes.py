"""From what a callback returned or raised to the report that a server gets. Sends nothing."""

from __future__ import annotations

import logging
import traceback
from typing import Final

from opsqueue.client.chunk_context import FailSubmission, RetryLater
from opsqueue.client.session import Session
from opsqueue.protocol import consumer as wire

logger = logging.getLogger("opsqueue.consumer")

#: Reasons for which a result is of no use to anybody.
UNWANTED: Final = frozenset(("cancelled", "failed", "completed"))

#: Bytes of a failure's text; servers keep no more.
MAX_FAILURE_BYTES = 64 * 1024
#: Bytes of a result that goes along with its report: servers take messages of 64 MiB.
MAX_DIRECT_BYTES = wire.MAX_MESSAGE_BYTES - 1024


def failure_text(text: str) -> str:
    """A text that can be sent, and logged: valid Unicode, its middle left out when it is too long."""
    encoded = text.encode(errors="backslashreplace")
    if len(encoded) > MAX_FAILURE_BYTES:
        half = MAX_FAILURE_BYTES // 2 - 10
        encoded = encoded[:half] + b"\n...\n" + encoded[-half:]
    return encoded.decode(errors="ignore")


def of_exception(session: Session, chunk_id: wire.ChunkId, error: BaseException) -> wire.ClientContents:
    """The report on a chunk whose callback raised `error`, which is logged."""
    if isinstance(error, RetryLater) and session.knows(wire.RETRY_LATER):
        logger.info("chunk %d of submission %d: %s", chunk_id.chunk_index, chunk_id.submission_id, error)
        return wire.RetryLater(chunk_id, error.delay_ms)
    text, summary = _explained(error)
    if isinstance(error, FailSubmission) and session.knows(wire.FAIL_SUBMISSION):
        logger.warning(
            "chunk %d fails its submission %d: %s",
            chunk_id.chunk_index, chunk_id.submission_id, failure_text(error.reason),
        )  # fmt: skip
        return wire.FailSubmission(chunk_id, failure_text(error.reason))
    return failed(chunk_id, text, summary)


def failed(chunk_id: wire.ChunkId, text: str, summary: str) -> wire.FailChunk:
    """The report on a chunk that failed, which is logged with `summary`."""
    logger.warning(
        "chunk %d of submission %d failed: %s", chunk_id.chunk_index, chunk_id.submission_id, failure_text(summary)
    )
    return wire.FailChunk(chunk_id, failure_text(text))


def direct(chunk_id: wire.ChunkId, output: bytes) -> wire.CompleteChunk | wire.FailChunk:
    """The report on a chunk whose result goes along with it; a failure when no message can hold it."""
    if len(output) <= MAX_DIRECT_BYTES:
        return wire.CompleteChunk(chunk_id, output)
    text = f"the result has {len(output)} bytes; of a submission without an object store it may have {MAX_DIRECT_BYTES}"
    return failed(chunk_id, text, text)


def not_stored(chunk_id: wire.ChunkId, error: Exception) -> wire.FailChunk:
    """The report on a chunk whose result could not be stored."""
    text = f"the result could not be stored: {error}"
    return failed(chunk_id, text, text)


def _explained(error: BaseException) -> tuple[str, str]:
    """The traceback, ending with the exception's qualified name and message; and that end alone."""
    try:
        message = str(error)
    except Exception as failed:
        message = f"(its message cannot be shown: {type(failed).__qualname__})"
    summary = f"{type(error).__qualname__}: {message}"
    text = "".join(traceback.format_exception(error)).rstrip()
    return (text if text.endswith(summary) else f"{text}\n{summary}"), summary
