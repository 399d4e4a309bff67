"""Every exception of the client library, in one tree; raises none of them itself.

Four kinds: what a submission came to (SubmissionFailedError and its siblings), what the caller got wrong
(IncorrectUsageError), what was stored and cannot be read (DeserializationError), and what went wrong underneath
(OpsqueueInternalError, with the cause in `__cause__`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opsqueue.client.values import (
        ChunkFailed,
        SubmissionCancelled,
        SubmissionFailed,
        SubmissionNotCancellable,
    )

__all__ = [
    "ChunkCountIsZeroError",
    "ChunkNotFoundError",
    "ChunkRetrievalError",
    "ChunkStorageError",
    "ChunksStorageError",
    "DecompressionError",
    "DeserializationError",
    "IncorrectUsageError",
    "InternalConsumerClientError",
    "InternalProducerClientError",
    "NewObjectStoreClientError",
    "OpsqueueInternalError",
    "SerializationError",
    "ServerLacksFeatureError",
    "SubmissionCancelledError",
    "SubmissionConflictError",
    "SubmissionEndedError",
    "SubmissionFailedError",
    "SubmissionNotCancellableError",
    "SubmissionNotCompletedYetError",
    "SubmissionNotFoundError",
    "SubmissionNotRetryableError",
    "TooManyMatchingSubmissionsError",
    "TryFromIntError",
    "UnexpectedOpsqueueConsumerServerResponseError",
]


class SubmissionFailedError(Exception):
    """A chunk failed as often as the server allows, so the submission can never be completed."""

    def __init__(self, submission: SubmissionFailed, chunk: ChunkFailed) -> None:
        super().__init__(submission, chunk)
        self.submission = submission
        self.chunk = chunk
        self.failure: str = chunk.failure

    def __str__(self) -> str:
        return f"submission {self.submission.id.id} failed at chunk {self.chunk.chunk_index.id}:\n{self.failure}"


class SubmissionCancelledError(Exception):
    """The submission was cancelled, so there will be no results."""

    def __init__(self, submission: SubmissionCancelled) -> None:
        super().__init__(submission)
        self.submission = submission

    def __str__(self) -> str:
        return f"submission {self.submission.id.id} was cancelled at {self.submission.cancelled_at.isoformat()}"


class SubmissionNotCancellableError(Exception):
    """The submission had ended already. `submission` says how; `chunk` is the failed one, if it failed."""

    def __init__(self, submission: SubmissionNotCancellable, chunk: ChunkFailed | None = None) -> None:
        super().__init__(submission, chunk)
        self.submission = submission
        self.chunk = chunk

    def __str__(self) -> str:
        reason = "" if self.chunk is None else f" at chunk {self.chunk.chunk_index.id}: {self.chunk.failure}"
        return f"the submission cannot be cancelled, it is {type(self.submission).__name__.lower()}{reason}"


class SubmissionNotRetryableError(Exception):
    """The submission cannot be done again: it has not failed, or another one does the same.

    `state` is its state, such as "InProgress" or "Completed"; `reason` is the server's, for people.
    """

    def __init__(self, submission_id: int, state: str, reason: str) -> None:
        super().__init__(submission_id, state, reason)
        self.submission_id = submission_id
        self.state = state
        self.reason = reason

    def __str__(self) -> str:
        return f"submission {self.submission_id} cannot be retried: {self.reason}"


class IncorrectUsageError(TypeError):
    """The client library was asked for something that cannot be."""


class TryFromIntError(IncorrectUsageError):
    """A number is outside the range that its use allows."""


class ChunkNotFoundError(IncorrectUsageError):
    """There is no such chunk in the queue."""


class SubmissionNotFoundError(IncorrectUsageError):
    """There is no such submission in the queue; finished ones are forgotten after a while."""

    def __init__(self, submission_id: int) -> None:
        super().__init__(submission_id)
        self.submission_id = submission_id

    def __str__(self) -> str:
        return f"submission {self.submission_id} is not known to the server (finished ones are forgotten after a while)"


class SubmissionEndedError(IncorrectUsageError):
    """The submission has ended, so it can be neither paused nor unpaused. `state` is "Failed" or the like."""

    def __init__(self, submission_id: int, state: str) -> None:
        super().__init__(submission_id, state)
        self.submission_id = submission_id
        self.state = state

    def __str__(self) -> str:
        return f"submission {self.submission_id} has ended (it is {self.state}): it can be neither paused nor unpaused"


class ChunkCountIsZeroError(IncorrectUsageError):
    """A submission without chunks. Kept for programs that catch it: empty submissions are completed at once."""


class NewObjectStoreClientError(IncorrectUsageError):
    """The object store's URL or options are wrong."""


class SubmissionConflictError(IncorrectUsageError):
    """A submission with the same key or prefix and other contents is in progress; nothing was inserted."""


class SubmissionNotCompletedYetError(IncorrectUsageError):
    """The submission is not completed; its arguments are a text and the SubmissionId."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else type(self).__name__


class TooManyMatchingSubmissionsError(IncorrectUsageError):
    """More submissions match than the server gives at once; ask for more pairs of strategic metadata."""

    def __init__(self, max_submissions: int) -> None:
        super().__init__(max_submissions)
        self.max_submissions = max_submissions

    def __str__(self) -> str:
        return f"more than {self.max_submissions} submissions match; ask for more pairs of strategic metadata"


class SerializationError(IncorrectUsageError):
    """An operation or result that its format cannot write; `index` is its place in the submission or chunk, if known.

    In the submission for a producer, in the chunk for a consumer's results. `reason` names the type.
    """

    def __init__(self, reason: str, index: int | None = None) -> None:
        super().__init__(reason, index)
        self.reason = reason
        self.index = index

    def __str__(self) -> str:
        return self.reason if self.index is None else f"operation {self.index}: {self.reason}"


class DeserializationError(ValueError):
    """Bytes that hold no operations, or a value among them that this program cannot make. `chunk` says where, if known.

    Its text is as in "chunk 3 of submission 17".
    """

    chunk: str | None = None

    def __str__(self) -> str:
        text = super().__str__()
        return text if self.chunk is None else f"{self.chunk}: {text}"


class DecompressionError(DeserializationError):
    """A compressed chunk that is cut off, broken, or larger than the limit."""


class OpsqueueInternalError(Exception):
    """Something underneath went wrong: the network, the server, or the object store."""


class UnexpectedOpsqueueConsumerServerResponseError(OpsqueueInternalError):
    """The server sent a consumer something that the protocol does not have."""


class ChunkRetrievalError(OpsqueueInternalError):
    """A chunk could not be fetched."""


class ChunksStorageError(OpsqueueInternalError):
    """A producer could not store its chunks."""


class ChunkStorageError(OpsqueueInternalError):
    """A consumer could not store a chunk's output."""


class InternalConsumerClientError(OpsqueueInternalError):
    """A consumer's connection was lost or refused."""


class InternalProducerClientError(OpsqueueInternalError):
    """A producer's request failed, also after retrying where that was possible."""


class ServerLacksFeatureError(InternalProducerClientError):
    """The server does not offer what was asked for; the reference implementation lacks what goes beyond it."""
