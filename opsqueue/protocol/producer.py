"""Producers' JSON bodies as types, decoded and encoded; no HTTP, no I/O.

Byte strings are arrays of 0..255 in JSON, so `metadata` and contents are lists of integers here. Enums are externally
tagged, which is a struct with one field of many set; the properties give the one that is. Times are aware datetimes.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from opsqueue.protocol.errors import BadJsonError, WrongShapeError

#: Ids, indexes and counts.
U63: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]
I64: TypeAlias = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Byte: TypeAlias = Annotated[int, Meta(ge=0, le=255)]
ByteArray: TypeAlias = list[Byte]
StrategicMetadata: TypeAlias = dict[str, I64]
Time: TypeAlias = Annotated[datetime, Meta(tz=True)]


class SeeObjectStorage(Struct, frozen=True):
    """Contents that stand in the object store as `{prefix}/{index}-in.bin`, index from 0 to count - 1."""

    prefix: str
    count: U63


class Direct(Struct, frozen=True):
    """Contents inside the request; None is stored as an empty byte string."""

    contents: list[ByteArray | None]


ChunkContents: TypeAlias = SeeObjectStorage | Direct


class TaggedContents(Struct, frozen=True, forbid_unknown_fields=True):
    """The externally tagged form of ChunkContents: exactly one field is set."""

    see_object_storage: SeeObjectStorage | UnsetType = msgspec.field(name="SeeObjectStorage", default=UNSET)
    direct: Direct | UnsetType = msgspec.field(name="Direct", default=UNSET)

    def __post_init__(self) -> None:
        if isinstance(self.see_object_storage, UnsetType) == isinstance(self.direct, UnsetType):
            raise ValueError("Expected exactly one of `SeeObjectStorage` and `Direct`")


class InsertSubmission(Struct, frozen=True):
    """The body of POST /producer/submissions."""

    tagged_contents: TaggedContents = msgspec.field(name="chunk_contents")
    metadata: ByteArray | None = None
    strategic_metadata: StrategicMetadata = {}
    chunk_size: I64 | None = None
    if_paused: bool | UnsetType = msgspec.field(name="paused", default=UNSET)

    @classmethod
    def of(
        cls,
        chunk_contents: ChunkContents,
        *,
        metadata: bytes | None = None,
        strategic_metadata: dict[str, int] | None = None,
        chunk_size: int | None = None,
        paused: bool = False,
    ) -> InsertSubmission:
        """A body from values. `paused` is left out unless true: other servers may not know it."""
        if isinstance(chunk_contents, SeeObjectStorage):
            tagged = TaggedContents(see_object_storage=chunk_contents)
        else:
            tagged = TaggedContents(direct=chunk_contents)
        return cls(
            tagged_contents=tagged,
            metadata=as_array(metadata),
            strategic_metadata=strategic_metadata or {},
            chunk_size=chunk_size,
            if_paused=True if paused else UNSET,
        )

    @property
    def chunk_contents(self) -> ChunkContents:
        """The one variant that was given."""
        tagged = self.tagged_contents
        if not isinstance(tagged.see_object_storage, UnsetType):
            return tagged.see_object_storage
        assert not isinstance(tagged.direct, UnsetType)
        return tagged.direct

    @property
    def paused(self) -> bool:
        """Whether no chunk is to be handed out until the submission is unpaused."""
        return self.if_paused is True


class Submission(Struct, frozen=True):
    """S: an unfinished submission."""

    id: U63
    prefix: str | None
    chunks_total: U63
    chunks_done: U63
    chunk_size: I64
    metadata: ByteArray | None
    strategic_metadata: StrategicMetadata
    otel_trace_carrier: str


class SubmissionCompleted(Struct, frozen=True):
    """SC: all chunks are done."""

    id: U63
    prefix: str | None
    chunks_total: U63
    chunk_size: I64
    metadata: ByteArray | None
    strategic_metadata: StrategicMetadata
    completed_at: Time
    otel_trace_carrier: str


class SubmissionFailed(Struct, frozen=True):
    """SF: one chunk failed for good."""

    id: U63
    prefix: str | None
    chunks_total: U63
    chunks_done: U63 | None
    chunk_size: I64
    metadata: ByteArray | None
    strategic_metadata: StrategicMetadata
    failed_at: Time
    failed_chunk_id: U63
    otel_trace_carrier: str


class SubmissionCancelled(Struct, frozen=True):
    """SX: a producer cancelled it."""

    id: U63
    prefix: str | None
    chunks_total: U63
    chunks_done: U63
    metadata: ByteArray | None
    strategic_metadata: StrategicMetadata
    cancelled_at: Time


class ChunkFailed(Struct, frozen=True):
    """CF: the chunk that made its submission fail."""

    submission_id: U63
    chunk_index: U63
    input_content: ByteArray | None
    failure: str
    failed_at: Time


class InProgress(Struct, frozen=True):
    """Status of a submission whose chunks are handed out."""

    submission: Submission


class Paused(Struct, frozen=True):
    """Status of a submission whose chunks are held back."""

    submission: Submission


class Completed(Struct, frozen=True):
    """Status of a submission whose chunks are all done."""

    submission: SubmissionCompleted


class Failed(Struct, frozen=True):
    """Status of a submission with a chunk that failed for good."""

    submission: SubmissionFailed
    chunk: ChunkFailed


class Cancelled(Struct, frozen=True):
    """Status of a submission that a producer cancelled."""

    submission: SubmissionCancelled


Status: TypeAlias = InProgress | Paused | Completed | Failed | Cancelled
#: Why a submission cannot be cancelled.
Ended: TypeAlias = Completed | Failed | Cancelled


class TaggedStatus(Struct, frozen=True, forbid_unknown_fields=True):
    """The externally tagged form of Status: exactly one field is set."""

    in_progress: Submission | UnsetType = msgspec.field(name="InProgress", default=UNSET)
    paused: Submission | UnsetType = msgspec.field(name="Paused", default=UNSET)
    completed: SubmissionCompleted | UnsetType = msgspec.field(name="Completed", default=UNSET)
    failed: tuple[SubmissionFailed, ChunkFailed] | UnsetType = msgspec.field(name="Failed", default=UNSET)
    cancelled: SubmissionCancelled | UnsetType = msgspec.field(name="Cancelled", default=UNSET)

    def __post_init__(self) -> None:
        if sum(not isinstance(getattr(self, name), UnsetType) for name in self.__struct_fields__) != 1:
            raise ValueError("Expected exactly one of `InProgress`, `Paused`, `Completed`, `Failed`, `Cancelled`")

    @classmethod
    def of(cls, status: Status) -> TaggedStatus:
        """The tagged form of `status`."""
        match status:
            case InProgress(submission=submission):
                return cls(in_progress=submission)
            case Paused(submission=submission):
                return cls(paused=submission)
            case Completed(submission=completed):
                return cls(completed=completed)
            case Failed(submission=failed, chunk=chunk):
                return cls(failed=(failed, chunk))
            case Cancelled(submission=cancelled):
                return cls(cancelled=cancelled)

    @property
    def status(self) -> Status:
        """The one variant that was given."""
        if not isinstance(self.in_progress, UnsetType):
            return InProgress(self.in_progress)
        if not isinstance(self.paused, UnsetType):
            return Paused(self.paused)
        if not isinstance(self.completed, UnsetType):
            return Completed(self.completed)
        if not isinstance(self.failed, UnsetType):
            return Failed(*self.failed)
        assert not isinstance(self.cancelled, UnsetType)
        return Cancelled(self.cancelled)


T = TypeVar("T")

insert_decoder = msgspec.json.Decoder(InsertSubmission)
strategic_metadata_decoder = msgspec.json.Decoder(StrategicMetadata)
_status_decoder: msgspec.json.Decoder[TaggedStatus | None] = msgspec.json.Decoder(TaggedStatus | None)
_id_decoder: msgspec.json.Decoder[int] = msgspec.json.Decoder(U63)
_optional_id_decoder: msgspec.json.Decoder[int | None] = msgspec.json.Decoder(U63 | None)
_ids_decoder = msgspec.json.Decoder(list[U63])

#: Any body of this module as JSON, fields in the order of the declarations.
encode = msgspec.json.Encoder().encode


def as_array(data: bytes | None) -> list[int] | None:
    """A byte string as JSON has it."""
    return None if data is None else list(data)


def as_bytes(array: list[int] | None) -> bytes | None:
    """JSON's array of 0..255 as the byte string that it stands for."""
    return None if array is None else bytes(array)


def decode(decoder: msgspec.json.Decoder[T], data: bytes, what: str) -> T:
    """`data` as the decoder's type. Raises BadJsonError or WrongShapeError, whose text names `what`."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise WrongShapeError(f"{what} has the wrong shape: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadJsonError(f"{what} is not JSON: {error}") from None


def decode_insert(data: bytes) -> InsertSubmission:
    """The body of an insert."""
    return decode(insert_decoder, data, "the submission to insert")


def decode_strategic_metadata(data: bytes) -> dict[str, int]:
    """The body of a lookup by strategic metadata."""
    return decode(strategic_metadata_decoder, data, "the strategic metadata")


def decode_status(data: bytes) -> Status | None:
    """A status; None when the submission is unknown."""
    tagged = decode(_status_decoder, data, "the submission's status")
    return None if tagged is None else tagged.status


def decode_not_cancellable(data: bytes) -> Ended:
    """The body of a 409 to a cancellation."""
    status = decode_status(data)
    if not isinstance(status, Completed | Failed | Cancelled):
        raise WrongShapeError("the submission's status must be one of Completed, Failed and Cancelled")
    return status


def decode_id(data: bytes) -> int:
    """A bare id or count."""
    return decode(_id_decoder, data, "the id or count")


def decode_optional_id(data: bytes) -> int | None:
    """A bare id, or null."""
    return decode(_optional_id_decoder, data, "the id")


def decode_ids(data: bytes) -> list[int]:
    """An array of ids."""
    return decode(_ids_decoder, data, "the list of ids")


def encode_status(status: Status) -> bytes:
    """A status as JSON; also the body of a 409 to a cancellation."""
    return encode(TaggedStatus.of(status))
