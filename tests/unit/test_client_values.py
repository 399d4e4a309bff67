"""The client library's values, exceptions and signatures are those of its contract."""

from __future__ import annotations

import importlib
import inspect
import pickle
from datetime import UTC, datetime
from typing import Any

import pytest

import opsqueue.consumer
import opsqueue.exceptions
import opsqueue.opsqueue_internal as internal
import opsqueue.producer
from opsqueue import common, exceptions
from opsqueue.consumer import DEFAULT_STRATEGY, ConsumerClient, Strategy
from opsqueue.opsqueue_internal import ChunkIndex
from opsqueue.producer import (
    ChunkFailed,
    ChunkSizeIsZeroError,
    ProducerClient,
    SubmissionCompleted,
    SubmissionFailed,
    SubmissionId,
    SubmissionNotCancellable,
    SubmissionStatus,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
ID = SubmissionId(5)
COMMON: dict[str, Any] = {
    "id": ID, "chunks_total": 3, "metadata": b"m", "strategic_metadata": {"a": 1}, "prefix": "p"
}  # fmt: skip
KEPT: dict[str, Any] = {"chunk_size": 2, "otel_trace_carrier": {"traceparent": "x"}}
SUBMISSION = internal.Submission(chunks_done=1, **COMMON, **KEPT)
COMPLETED = SubmissionCompleted(completed_at=NOW, **COMMON, **KEPT)
FAILED = SubmissionFailed(chunks_done=None, failed_at=NOW, failed_chunk_id=1, **COMMON, **KEPT)
CANCELLED = internal.SubmissionCancelled(chunks_done=1, cancelled_at=NOW, **COMMON)
CHUNK_FAILED = ChunkFailed(submission_id=ID, chunk_index=ChunkIndex(1), failure="no", failed_at=NOW)
CHUNK = internal.Chunk(ID, ChunkIndex(1), b"in", 0, None, b"m", {"traceparent": "x"})
NESTED = Strategy.PreferDistinct(meta_key="a", underlying=Strategy.Oldest())

VALUES: list[Any] = [
    ID,
    ChunkIndex(7),
    Strategy.Oldest(),
    Strategy.Newest(),
    Strategy.Random(),
    NESTED,
    SUBMISSION,
    COMPLETED,
    FAILED,
    CANCELLED,
    CHUNK_FAILED,
    CHUNK,
    SubmissionStatus.InProgress(SUBMISSION),
    SubmissionStatus.Paused(SUBMISSION),
    SubmissionStatus.Completed(COMPLETED),
    SubmissionStatus.Failed(FAILED, CHUNK_FAILED),
    SubmissionStatus.Cancelled(CANCELLED),
    SubmissionNotCancellable.Completed(COMPLETED),
    SubmissionNotCancellable.Failed(FAILED, CHUNK_FAILED),
    SubmissionNotCancellable.Cancelled(CANCELLED),
]


def _imported(kind: type) -> object:
    found: object = importlib.import_module(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__qualname__)
def test_values_are_frozen_hashable_picklable_and_importable(value: Any) -> None:
    assert _imported(type(value)) is type(value)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        copy = pickle.loads(pickle.dumps(value, protocol))
        assert copy == value
        assert hash(copy) == hash(value)
    for name in (*type(value).__match_args__, *getattr(value, "__slots__", ()), "anything"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(value, name, None)


@pytest.mark.parametrize("kind", [SubmissionId, ChunkIndex])
def test_ids_compare_within_their_type_only(kind: Any) -> None:
    assert kind(1) < kind(2) <= kind(2) != kind(3)
    assert kind(5) != 5
    assert SubmissionId(5) != ChunkIndex(5)
    assert int(kind(5)) == kind(5).id == 5
    assert not isinstance(kind(5), int)
    assert kind(0)
    assert "__bool__" not in dir(kind)
    assert repr(kind(5)) == str(kind(5)) == f"{kind(5)}" == f"{kind.__name__}(id=5)"
    with pytest.raises(TypeError):
        kind(1) < 2  # noqa: B015
    assert kind(2**63 - 1).id == 2**63 - 1
    assert kind(id=3) == kind(3)


@pytest.mark.parametrize("kind", [SubmissionId, ChunkIndex])
@pytest.mark.parametrize(
    ("number", "error"),
    [
        (2**63, exceptions.TryFromIntError),
        (2**64 - 1, exceptions.TryFromIntError),
        (2**64, OverflowError),
        (-1, OverflowError),
        ("1", TypeError),
        (1.0, TypeError),
    ],
)
def test_ids_out_of_range_are_refused(kind: Any, number: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        kind(number)


def test_strategies_show_themselves_as_in_the_contract() -> None:
    assert repr(Strategy.Newest()) == str(Strategy.Newest()) == "Strategy.Newest"
    assert str(NESTED) == repr(NESTED) == 'Strategy.PreferDistinct { meta_key: "a", underlying: Strategy.Oldest }'


@pytest.mark.parametrize("parent", [Strategy, SubmissionStatus, SubmissionNotCancellable])
def test_parents_of_variants_cannot_be_instantiated(parent: Any) -> None:
    with pytest.raises(TypeError):
        parent()


@pytest.mark.parametrize("value", [value for value in VALUES if "." in type(value).__qualname__])
def test_variants_are_nested_subclasses(value: Any) -> None:
    parent = _imported(
        type(
            "Parent", (), {"__module__": type(value).__module__, "__qualname__": type(value).__qualname__.split(".")[0]}
        )
    )
    assert isinstance(value, parent)  # type: ignore[arg-type]


def test_match_args_are_those_of_the_contract() -> None:
    assert Strategy.Oldest.__match_args__ == ()
    assert Strategy.PreferDistinct.__match_args__ == ("meta_key", "underlying")
    assert SubmissionStatus.InProgress.__match_args__ == ("submission",)
    assert SubmissionStatus.Failed.__match_args__ == ("submission", "chunk")
    assert SubmissionNotCancellable.Failed.__match_args__ == ("submission", "chunk")
    match SubmissionStatus.Failed(FAILED, CHUNK_FAILED):
        case SubmissionStatus.Failed(submission, chunk):
            assert (submission, chunk) == (FAILED, CHUNK_FAILED)


def test_paused_is_in_progress_for_programs_that_do_not_know_it() -> None:
    assert isinstance(SubmissionStatus.Paused(SUBMISSION), SubmissionStatus.InProgress)


@pytest.mark.parametrize(
    "arguments", [{"meta_key": 1, "underlying": Strategy.Oldest()}, {"meta_key": "a", "underlying": Strategy.Oldest}]
)
def test_prefer_distinct_refuses_what_is_no_strategy(arguments: Any) -> None:
    with pytest.raises(TypeError):
        Strategy.PreferDistinct(**arguments)


DESERIALIZATION_ERROR = exceptions.DeserializationError("no CBOR")
DESERIALIZATION_ERROR.chunk = "chunk 3 of submission 17"

ERRORS: list[Exception] = [
    exceptions.SubmissionFailedError(FAILED, CHUNK_FAILED),
    exceptions.SubmissionCancelledError(CANCELLED),
    exceptions.SubmissionNotCancellableError(SubmissionNotCancellable.Completed(COMPLETED)),
    exceptions.SubmissionNotCancellableError(SubmissionNotCancellable.Failed(FAILED, CHUNK_FAILED), CHUNK_FAILED),
    exceptions.SubmissionNotFoundError(7),
    exceptions.SubmissionNotCompletedYetError("not yet", ID),
    exceptions.TooManyMatchingSubmissionsError(3),
    exceptions.SubmissionNotRetryableError(7, "Completed", "it is completed"),
    exceptions.SubmissionEndedError(7, "Failed"),
    exceptions.ServerLacksFeatureError("this server lists no submissions"),
    ChunkSizeIsZeroError(),
    exceptions.SerializationError("no such type", 3),
    DESERIALIZATION_ERROR,
    exceptions.DecompressionError("cut off"),
    *(
        getattr(exceptions, name)("text")
        for name in exceptions.__all__
        if name.startswith(("Chunk", "Internal", "Opsqueue", "Unexpected", "New", "Try", "Incorrect"))
    ),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_exceptions_unpickle_with_everything_that_they_had(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert copy.args == error.args
    assert vars(copy) == vars(error)
    assert str(copy) == str(error) != ""


def test_exceptions_have_the_bases_of_the_contract() -> None:
    usage = {
        "TryFromIntError", "ChunkNotFoundError", "SubmissionNotFoundError", "ChunkCountIsZeroError",
        "NewObjectStoreClientError", "SubmissionNotCompletedYetError", "TooManyMatchingSubmissionsError",
    }  # fmt: skip
    inner = {
        "UnexpectedOpsqueueConsumerServerResponseError", "ChunkRetrievalError", "ChunksStorageError",
        "ChunkStorageError", "InternalConsumerClientError", "InternalProducerClientError",
    }  # fmt: skip
    assert issubclass(exceptions.IncorrectUsageError, TypeError)
    for name in usage:
        assert issubclass(getattr(exceptions, name), exceptions.IncorrectUsageError), name
    for name in inner:
        assert issubclass(getattr(exceptions, name), exceptions.OpsqueueInternalError), name
    assert exceptions.SubmissionFailedError.__bases__ == (Exception,)
    assert exceptions.SubmissionFailedError(FAILED, CHUNK_FAILED).failure == "no"
    assert issubclass(ChunkSizeIsZeroError, Exception)


def _signature(method: Any) -> list[tuple[str, str, Any]]:
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return [(parameter.name, parameter.kind.name, parameter.default) for parameter in parameters]


ANY, ONLY, EMPTY = "POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY", inspect.Parameter.empty
FORMAT = ("serialization_format", ONLY, common.DEFAULT_SERIALIZATION_FORMAT)
META = [("metadata", ONLY, None), ("strategic_metadata", ONLY, None)]
COMPRESSION = ("compression", ONLY, None)
OPS = [("ops", ANY, EMPTY), ("chunk_size", ONLY, EMPTY), FORMAT, *META, COMPRESSION]
CHUNKS = [("chunk_contents", ANY, EMPTY), *META, ("chunk_size", ONLY, None)]
BY_ID = [("submission_id", ANY, EMPTY)]
TIMEOUT = ("timeout", ONLY, None)
STRATEGY = ("strategy", ONLY, Strategy.Random())
PREFETCH = ("prefetch", ONLY, None)
REPORT = [("submission_id", ANY, EMPTY), ("submission_prefix", ANY, EMPTY), ("chunk_index", ANY, EMPTY)]
NEW = [("opsqueue_url", ANY, EMPTY), ("object_store_url", ANY, EMPTY), ("object_store_options", ONLY, [])]

SIGNATURES: dict[Any, list[tuple[str, str, Any]]] = {
    ProducerClient.__init__: NEW,
    ProducerClient.server_version: [],
    ProducerClient.count_submissions: [],
    ProducerClient.insert_submission: OPS,
    ProducerClient.run_submission: [*OPS, ("progress", ONLY, False)],
    ProducerClient.async_run_submission: OPS,
    ProducerClient.insert_submission_chunks: CHUNKS,
    ProducerClient.run_submission_chunks: [*CHUNKS, ("progress", ONLY, False)],
    ProducerClient.async_run_submission_chunks: CHUNKS,
    ProducerClient.blocking_stream_completed_submission: [*BY_ID, FORMAT, TIMEOUT],
    ProducerClient.blocking_stream_completed_submission_chunks: [*BY_ID, TIMEOUT],
    ProducerClient.async_stream_completed_submission_chunks: BY_ID,
    ProducerClient.try_stream_completed_submission: [*BY_ID, FORMAT],
    ProducerClient.try_stream_completed_submission_chunks: BY_ID,
    ProducerClient.cancel_submission: BY_ID,
    ProducerClient.get_submission_status: BY_ID,
    ProducerClient.is_completed: BY_ID,
    ProducerClient.lookup_submission_id_by_prefix: [("prefix", ANY, EMPTY)],
    ProducerClient.lookup_submission_ids_by_strategic_metadata: [("strategic_metadata", ANY, EMPTY)],
    ConsumerClient.__init__: NEW,
    ConsumerClient.run_each_op: [("op_callback", ANY, EMPTY), STRATEGY, FORMAT, PREFETCH],
    ConsumerClient.run_each_chunk: [("chunk_callback", ANY, EMPTY), STRATEGY, FORMAT, PREFETCH],
    ConsumerClient.run_each_chunk_raw: [("chunk_callback", ANY, EMPTY), STRATEGY, PREFETCH],
    ConsumerClient.reserve_chunks: [("max", ANY, 1), ("strategy", ANY, Strategy.Newest())],
    ConsumerClient.complete_chunk: [*REPORT, ("output_content", ANY, EMPTY)],
    ConsumerClient.fail_chunk: [*REPORT, ("failure", ANY, EMPTY)],
}


@pytest.mark.parametrize("method", SIGNATURES, ids=lambda method: method.__qualname__)
def test_methods_take_what_the_contract_says(method: Any) -> None:
    assert _signature(method) == SIGNATURES[method]


def test_modules_export_the_names_of_the_contract() -> None:
    assert set(opsqueue.producer.__all__) == {
        "ProducerClient", "SubmissionId", "SubmissionStatus", "SubmissionCompleted", "SubmissionFailedError",
        "SubmissionFailed", "SubmissionNotCancellable", "SubmissionNotCancellableError", "SubmissionNotFoundError",
        "TooManyMatchingSubmissionsError", "ChunkFailed",
    }  # fmt: skip
    assert set(opsqueue.consumer.__all__) == {"ConsumerClient", "Strategy", "Chunk", "SubmissionId"}
    for name in ("SerializationFormat", "encode_chunk", "decode_chunk", "DEFAULT_SERIALIZATION_FORMAT"):
        assert getattr(opsqueue.producer, name) is getattr(common, name)
    assert Strategy.Random() == DEFAULT_STRATEGY
    for name in internal.__all__:
        assert hasattr(internal, name)


def test_chunks_are_encoded_and_decoded_by_any_format() -> None:
    for fmt in (common.DEFAULT_SERIALIZATION_FORMAT, common.json_as_bytes, pickle):
        assert list(common.decode_chunk(common.encode_chunk((1, "a"), fmt), fmt)) == [1, "a"]
    with pytest.raises(AssertionError):
        common.decode_chunk(b"5", common.json_as_bytes)
