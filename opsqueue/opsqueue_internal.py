"""The client library below serialization: the raw clients and every value. Only re-exports; programs rarely need it."""

from opsqueue.client.download import PyChunksIter
from opsqueue.client.raw_consumer import ConsumerClient
from opsqueue.client.raw_producer import ProducerClient
from opsqueue.client.values import (
    Chunk,
    ChunkFailed,
    ChunkIndex,
    Strategy,
    Submission,
    SubmissionCancelled,
    SubmissionCompleted,
    SubmissionFailed,
    SubmissionId,
    SubmissionNotCancellable,
    SubmissionStatus,
)
from opsqueue.exceptions import InternalConsumerClientError as ConsumerClientError
from opsqueue.exceptions import InternalProducerClientError as ProducerClientError

__all__ = [
    "Chunk",
    "ChunkFailed",
    "ChunkIndex",
    "ConsumerClient",
    "ConsumerClientError",
    "ProducerClient",
    "ProducerClientError",
    "PyChunksIter",
    "Strategy",
    "Submission",
    "SubmissionCancelled",
    "SubmissionCompleted",
    "SubmissionFailed",
    "SubmissionId",
    "SubmissionNotCancellable",
    "SubmissionStatus",
]
