"""Consumers' messages as types, decoded from and encoded to CBOR; no WebSocket, no I/O.

The general decoder: it reads whatever the protocol allows (byte strings or arrays of integers, maps in any order, extra
fields) and raises MessageError for everything else. The server reads its hot messages with a decoder of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, TypeAlias

import cbor2
import msgspec
from msgspec.structs import asdict

from opsqueue.protocol import packed
from opsqueue.protocol import strategy as strategies
from opsqueue.protocol.errors import MessageError, StrategyError, UnservableRequestError
from opsqueue.protocol.fields import (
    U63_MAX,
    U64_MAX,
    field,
    read_array,
    read_bytes,
    read_cbor,
    read_integer,
    read_map,
    read_optional,
    read_text,
    read_variant,
    shown,
)
from opsqueue.protocol.packed import Report
from opsqueue.protocol.strategy import Strategy

#: Payload of the heartbeats' pings.
HEARTBEAT: Final = b"\xf0\x9f\x92\x93"
#: Request header in which a consumer lists what it knows beyond the reference.
FEATURES_HEADER: Final = "Opsqueue-Features"
#: Bytes of one message, inbound and outbound; a frame holds at most 8 MiB of it.
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
MAX_FRAME_BYTES: Final = 8 * 1024 * 1024

CLEAN_CLOSE: Final = "clean-close"
REFUSAL: Final = "refusal"
DROPPED: Final = "dropped"
RELEASE: Final = "release"
EXTEND: Final = "extend"
RETRY_LATER: Final = "retry-later"
FAIL_SUBMISSION: Final = "fail-submission"
COMPACT: Final = "compact"
STRATEGIES: Final = "strategies"
#: Every extension of this version, as they stand in the header and in Init.
FEATURES: Final = (
    CLEAN_CLOSE, REFUSAL, DROPPED, RELEASE, EXTEND, RETRY_LATER, FAIL_SUBMISSION, COMPACT, STRATEGIES,
)  # fmt: skip

DropReason: TypeAlias = Literal["cancelled", "failed", "completed", "expired"]
_DROP_REASONS: dict[str, DropReason] = {name: name for name in ("cancelled", "failed", "completed", "expired")}

U32_MAX: Final = 2**32 - 1
_NANOS: Final = 1_000_000_000


class ChunkId(msgspec.Struct, frozen=True, order=True):
    """Which chunk a message is about."""

    submission_id: int
    chunk_index: int


class WantToReserveChunks(msgspec.Struct, frozen=True):
    """Asks for 1 to `max` chunks; answered once, when there is work."""

    max: int
    strategy: Strategy


class CompleteChunk(msgspec.Struct, frozen=True):
    """The chunk is done; its output goes along exactly when its input came inside the message."""

    id: ChunkId
    output_content: bytes | None


class FailChunk(msgspec.Struct, frozen=True):
    """The chunk failed, with the text why."""

    id: ChunkId
    failure: str


class WorkingOn(msgspec.Struct, frozen=True):
    """The callback of this chunk begins (feature clean-close)."""

    id: ChunkId


class ReleaseChunk(msgspec.Struct, frozen=True):
    """Gives the chunk back without counting a retry (feature release)."""

    id: ChunkId


class ExtendReservation(msgspec.Struct, frozen=True):
    """Starts the reservation's time again (feature extend)."""

    id: ChunkId


class RetryLater(msgspec.Struct, frozen=True):
    """Gives the chunk back, to be handed out after `delay_ms` milliseconds (feature retry-later)."""

    id: ChunkId
    delay_ms: int


class FailSubmission(msgspec.Struct, frozen=True):
    """Fails the chunk's submission at once, whatever retries are left (feature fail-submission)."""

    id: ChunkId
    reason: str


class ReportChunks(msgspec.Struct, frozen=True):
    """Many chunks that are done or failed, applied in their order (feature compact)."""

    reports: tuple[Report, ...]


class OpenCredit(msgspec.Struct, frozen=True):
    """Asks for `chunks` chunks as they become available; its nonce is the credit's name (feature compact)."""

    chunks: int
    strategy: Strategy


class AddCredit(msgspec.Struct, frozen=True):
    """Asks for `chunks` more on the credit that the message with the nonce `credit` opened (feature compact)."""

    credit: int
    chunks: int


class WithdrawCredit(msgspec.Struct, frozen=True):
    """Takes back what is left of a credit; CreditWithdrawn comes behind its last chunks (feature compact)."""

    credit: int


ClientContents: TypeAlias = (
    WantToReserveChunks
    | CompleteChunk
    | FailChunk
    | WorkingOn
    | ReleaseChunk
    | ExtendReservation
    | RetryLater
    | FailSubmission
    | ReportChunks
    | OpenCredit
    | AddCredit
    | WithdrawCredit
)


class ClientMessage(msgspec.Struct, frozen=True):
    """One frame of a consumer."""

    nonce: int
    contents: ClientContents


class Init(msgspec.Struct, frozen=True):
    """The first frame of a server. Durations in nanoseconds; `features` is None for a server without extensions."""

    max_missable_heartbeats: int
    heartbeat_interval_ns: int
    version_info: str
    conn_id: str
    features: tuple[str, ...] | None = None
    reservation_expiration_ns: int | None = None


class Chunk(msgspec.Struct, frozen=True):
    """A reserved chunk; `input_content` is None when it stands in the object store."""

    submission_id: int
    chunk_index: int
    input_content: bytes | None
    retries: int


class Submission(msgspec.Struct, frozen=True):
    """The unfinished submission of a reserved chunk."""

    id: int
    prefix: str | None
    chunks_total: int
    chunks_done: int
    chunk_size: int
    metadata: bytes | None
    strategic_metadata: dict[str, int]
    otel_trace_carrier: str


class ChunksReserved(msgspec.Struct, frozen=True):
    """The answer to WantToReserveChunks; `chunks` is None when `max` was 0."""

    nonce: int
    chunks: list[tuple[Chunk, Submission]] | None


class ReservationRefused(msgspec.Struct, frozen=True):
    """The request can never be served (feature refusal)."""

    nonce: int
    reason: str


class ChunkReservationExpired(msgspec.Struct, frozen=True):
    """The reservation outlived its time; the chunk is no longer held."""

    id: ChunkId


class ChunkDropped(msgspec.Struct, frozen=True):
    """The chunk is no longer held, and why (feature dropped)."""

    id: ChunkId
    reason: DropReason


class PackedGroup(msgspec.Struct, frozen=True):
    """Reserved chunks of one submission, which is described, or named by its id when its description is known.

    `retries`: one for each chunk; `inputs` is None when they stand in the object store.
    """

    submission: Submission | int
    chunks_done: int
    chunks: tuple[int, ...]
    retries: tuple[int, ...]
    inputs: tuple[bytes, ...] | None


class PackedChunks(msgspec.Struct, frozen=True):
    """Chunks for a request or on a credit, which `nonce` names (feature compact)."""

    nonce: int
    groups: tuple[PackedGroup, ...]


class CreditWithdrawn(msgspec.Struct, frozen=True):
    """The credit has ended; `left` chunks of it were not used (feature compact)."""

    nonce: int
    left: int


ServerMessage: TypeAlias = (
    Init | ChunksReserved | PackedChunks | CreditWithdrawn | ReservationRefused | ChunkReservationExpired | ChunkDropped
)


def decode_client(data: bytes) -> ClientMessage:
    """A consumer's frame. Raises MessageError; UnservableRequestError when only the strategy is at fault."""
    message = read_map(read_cbor(data), "message")
    nonce = read_integer(field(message, "nonce", "message"), 0, U64_MAX, "nonce")
    name, body = read_variant(field(message, "contents", "message"), "contents")
    reader = _CLIENT_READERS.get(name)
    if reader is None:
        raise MessageError(f"contents is {shown(name)}: known are {', '.join(_CLIENT_READERS)}")
    fields = read_map(body, name)
    try:
        return ClientMessage(nonce, reader(fields))
    except StrategyError as error:
        raise UnservableRequestError(nonce, str(error)) from None


def decode_server(data: bytes) -> ServerMessage:
    """A server's frame. Raises MessageError."""
    name, body = read_variant(read_cbor(data), "message")
    match name:
        case "Init":
            return _init(read_map(body, "Init"))
        case "Sync":
            return _sync(read_map(body, "Sync"))
        case "Async":
            return _async(body)
        case _:
            raise MessageError(f"message is {shown(name)}: known are Init, Sync and Async")


def encode_client(message: ClientMessage) -> bytes:
    """A consumer's frame."""
    contents = message.contents
    fields: dict[str, object]
    match contents:
        case WantToReserveChunks():
            fields = {"max": contents.max, "strategy": strategies.to_wire(contents.strategy)}
        case CompleteChunk():
            fields = {"id": _id_to_wire(contents.id), "output_content": contents.output_content}
        case FailChunk():
            fields = {"id": _id_to_wire(contents.id), "failure": contents.failure}
        case RetryLater():
            fields = {"id": _id_to_wire(contents.id), "delay_ms": contents.delay_ms}
        case FailSubmission():
            fields = {"id": _id_to_wire(contents.id), "reason": contents.reason}
        case ReportChunks():
            fields = {"reports": packed.reports_to_wire(contents.reports)}
        case OpenCredit():
            fields = {"chunks": contents.chunks, "strategy": strategies.to_wire(contents.strategy)}
        case AddCredit():
            fields = {"credit": contents.credit, "chunks": contents.chunks}
        case WithdrawCredit():
            fields = {"credit": contents.credit}
        case WorkingOn() | ReleaseChunk() | ExtendReservation():
            fields = {"id": _id_to_wire(contents.id)}
    return cbor2.dumps({"nonce": message.nonce, "contents": {type(contents).__name__: fields}})


def encode_server(message: ServerMessage) -> bytes:
    """A server's frame."""
    match message:
        case Init():
            return cbor2.dumps({"Init": _init_to_wire(message)})
        case ChunksReserved(nonce=nonce, chunks=chunks):
            result: dict[str, object] = {"Err": []}
            if chunks is not None:
                result = {"Ok": [[asdict(chunk), asdict(submission)] for chunk, submission in chunks]}
            return cbor2.dumps({"Sync": {"nonce": nonce, "contents": {"ChunksReserved": result}}})
        case PackedChunks(nonce=nonce, groups=groups):
            packed_groups = [_group_to_wire(group) for group in groups]
            return cbor2.dumps({"Sync": {"nonce": nonce, "contents": {"PackedChunks": packed_groups}}})
        case CreditWithdrawn(nonce=nonce, left=left):
            return cbor2.dumps({"Sync": {"nonce": nonce, "contents": {"CreditWithdrawn": {"left": left}}}})
        case ReservationRefused(nonce=nonce, reason=reason):
            return cbor2.dumps({"Sync": {"nonce": nonce, "contents": {"ReservationRefused": {"reason": reason}}}})
        case ChunkReservationExpired(id=chunk_id):
            return cbor2.dumps({"Async": {"ChunkReservationExpired": _id_to_wire(chunk_id)}})
        case ChunkDropped(id=chunk_id, reason=drop_reason):
            return cbor2.dumps({"Async": {"ChunkDropped": {**_id_to_wire(chunk_id), "reason": drop_reason}}})


def _group_to_wire(group: PackedGroup) -> list[object]:
    return [
        group.submission if isinstance(group.submission, int) else asdict(group.submission),
        group.chunks_done,
        packed.pack_indexes(group.chunks),
        packed.pack_numbers(group.retries) if any(group.retries) else None,
        None if group.inputs is None else list(group.inputs),
    ]


def _id_to_wire(chunk_id: ChunkId) -> dict[str, int]:
    return {"submission_id": chunk_id.submission_id, "chunk_index": chunk_id.chunk_index}


def _duration_to_wire(nanoseconds: int) -> dict[str, int]:
    return {"secs": nanoseconds // _NANOS, "nanos": nanoseconds % _NANOS}


def _init_to_wire(init: Init) -> dict[str, object]:
    fields: dict[str, object] = {
        "max_missable_heartbeats": init.max_missable_heartbeats,
        "heartbeat_interval": _duration_to_wire(init.heartbeat_interval_ns),
        "version_info": init.version_info,
        "conn_id": init.conn_id,
    }
    if init.features is not None:
        fields["features"] = list(init.features)
    if init.reservation_expiration_ns is not None:
        fields["reservation_expiration"] = _duration_to_wire(init.reservation_expiration_ns)
    return fields


def _chunk_id(value: object, where: str) -> ChunkId:
    fields = read_map(value, where)
    return ChunkId(
        read_integer(field(fields, "submission_id", where), 0, U63_MAX, f"{where}.submission_id"),
        read_integer(field(fields, "chunk_index", where), 0, U63_MAX, f"{where}.chunk_index"),
    )


def _duration(value: object, where: str) -> int:
    fields = read_map(value, where)
    seconds = read_integer(field(fields, "secs", where), 0, U64_MAX, f"{where}.secs")
    return seconds * _NANOS + read_integer(field(fields, "nanos", where), 0, U32_MAX, f"{where}.nanos")


def _want(fields: dict[object, object]) -> ClientContents:
    where = "WantToReserveChunks"
    maximum = read_integer(field(fields, "max", where), 0, U64_MAX, f"{where}.max")
    return WantToReserveChunks(maximum, strategies.parse(field(fields, "strategy", where)))


def _complete(fields: dict[object, object]) -> ClientContents:
    where = "CompleteChunk"
    chunk_id = _chunk_id(field(fields, "id", where), f"{where}.id")
    return CompleteChunk(chunk_id, read_optional(fields.get("output_content"), f"{where}.output_content", read_bytes))


def _fail(fields: dict[object, object]) -> ClientContents:
    chunk_id = _chunk_id(field(fields, "id", "FailChunk"), "FailChunk.id")
    return FailChunk(chunk_id, read_text(field(fields, "failure", "FailChunk"), "FailChunk.failure"))


def _retry_later(fields: dict[object, object]) -> ClientContents:
    chunk_id = _chunk_id(field(fields, "id", "RetryLater"), "RetryLater.id")
    delay = read_integer(field(fields, "delay_ms", "RetryLater"), 0, U63_MAX, "RetryLater.delay_ms")
    return RetryLater(chunk_id, delay)


def _fail_submission(fields: dict[object, object]) -> ClientContents:
    chunk_id = _chunk_id(field(fields, "id", "FailSubmission"), "FailSubmission.id")
    return FailSubmission(chunk_id, read_text(field(fields, "reason", "FailSubmission"), "FailSubmission.reason"))


def _only_id(
    message: type[WorkingOn | ReleaseChunk | ExtendReservation],
) -> Callable[[dict[object, object]], ClientContents]:
    where = message.__name__

    def read(fields: dict[object, object]) -> ClientContents:
        return message(_chunk_id(field(fields, "id", where), f"{where}.id"))

    return read


def _report(fields: dict[object, object]) -> ClientContents:
    return ReportChunks(packed.read_reports(field(fields, "reports", "ReportChunks"), "ReportChunks.reports"))


def _open_credit(fields: dict[object, object]) -> ClientContents:
    where = "OpenCredit"
    chunks = read_integer(field(fields, "chunks", where), 0, U64_MAX, f"{where}.chunks")
    return OpenCredit(chunks, strategies.parse(field(fields, "strategy", where)))


def _add_credit(fields: dict[object, object]) -> ClientContents:
    where = "AddCredit"
    credit = read_integer(field(fields, "credit", where), 0, U64_MAX, f"{where}.credit")
    return AddCredit(credit, read_integer(field(fields, "chunks", where), 0, U64_MAX, f"{where}.chunks"))


def _withdraw_credit(fields: dict[object, object]) -> ClientContents:
    where = "WithdrawCredit"
    return WithdrawCredit(read_integer(field(fields, "credit", where), 0, U64_MAX, f"{where}.credit"))


_CLIENT_READERS: dict[str, Callable[[dict[object, object]], ClientContents]] = {
    "WantToReserveChunks": _want,
    "CompleteChunk": _complete,
    "FailChunk": _fail,
    "WorkingOn": _only_id(WorkingOn),
    "ReleaseChunk": _only_id(ReleaseChunk),
    "ExtendReservation": _only_id(ExtendReservation),
    "RetryLater": _retry_later,
    "FailSubmission": _fail_submission,
    "ReportChunks": _report,
    "OpenCredit": _open_credit,
    "AddCredit": _add_credit,
    "WithdrawCredit": _withdraw_credit,
}


def _init(fields: dict[object, object]) -> Init:
    features: tuple[str, ...] | None = None
    if fields.get("features") is not None:
        listed = read_array(fields["features"], "Init.features")
        features = tuple(read_text(feature, "Init.features") for feature in listed)
    return Init(
        read_integer(field(fields, "max_missable_heartbeats", "Init"), 0, U64_MAX, "Init.max_missable_heartbeats"),
        _duration(field(fields, "heartbeat_interval", "Init"), "Init.heartbeat_interval"),
        read_text(field(fields, "version_info", "Init"), "Init.version_info"),
        read_text(field(fields, "conn_id", "Init"), "Init.conn_id"),
        features,
        read_optional(fields.get("reservation_expiration"), "Init.reservation_expiration", _duration),
    )


def _sync(fields: dict[object, object]) -> ServerMessage:
    nonce = read_integer(field(fields, "nonce", "Sync"), 0, U64_MAX, "Sync.nonce")
    name, body = read_variant(field(fields, "contents", "Sync"), "Sync.contents")
    if name == "ReservationRefused":
        return ReservationRefused(nonce, read_text(field(read_map(body, name), "reason", name), f"{name}.reason"))
    if name == "PackedChunks":
        return PackedChunks(nonce, tuple(_group(item) for item in read_array(body, name)))
    if name == "CreditWithdrawn":
        left = field(read_map(body, name), "left", name)
        return CreditWithdrawn(nonce, read_integer(left, 0, U64_MAX, f"{name}.left"))
    if name != "ChunksReserved":
        known = "ChunksReserved, ReservationRefused, PackedChunks and CreditWithdrawn"
        raise MessageError(f"Sync.contents is {shown(name)}: known are {known}")
    result, value = read_variant(body, name)
    if result == "Err":
        return ChunksReserved(nonce, None)
    if result != "Ok":
        raise MessageError(f"ChunksReserved is {shown(result)}: known are Ok and Err")
    return ChunksReserved(nonce, [_pair(item) for item in read_array(value, "ChunksReserved.Ok")])


def _async(value: object) -> ServerMessage:
    name, body = read_variant(value, "Async")
    if name == "ChunkReservationExpired":
        return ChunkReservationExpired(_chunk_id(body, name))
    if name != "ChunkDropped":
        raise MessageError(f"Async is {shown(name)}: known are ChunkReservationExpired and ChunkDropped")
    reason = read_text(field(read_map(body, name), "reason", name), f"{name}.reason")
    if reason not in _DROP_REASONS:
        raise MessageError(f"ChunkDropped.reason is {shown(reason)}: known are {', '.join(_DROP_REASONS)}")
    return ChunkDropped(_chunk_id(body, name), _DROP_REASONS[reason])


def _pair(value: object) -> tuple[Chunk, Submission]:
    pair = read_array(value, "ChunksReserved.Ok[]")
    if len(pair) != 2:
        raise MessageError(f"ChunksReserved.Ok[] must be a chunk and its submission, not {len(pair)} items")
    return _chunk(read_map(pair[0], "chunk")), _submission(read_map(pair[1], "submission"))


def _group(value: object) -> PackedGroup:
    where = "PackedChunks[]"
    parts = read_array(value, where)
    if len(parts) != 5:
        raise MessageError(f"{where} must have 5 items, not {len(parts)}")
    submission: Submission | int
    if isinstance(parts[0], dict):
        submission = _submission(parts[0])
    else:
        submission = read_integer(parts[0], 0, U63_MAX, f"{where}: the submission's id")
    done = read_integer(parts[1], 0, U63_MAX, f"{where}: chunks_done")
    chunks = packed.unpack_indexes(read_bytes(parts[2], f"{where}: the chunks"), f"{where}: the chunks")
    retries = (0,) * len(chunks)
    if parts[3] is not None:
        retries = packed.unpack_numbers(read_bytes(parts[3], f"{where}: the retries"), f"{where}: the retries")
    inputs: tuple[bytes, ...] | None = None
    if parts[4] is not None:
        inputs = tuple(read_bytes(item, f"{where}: an input") for item in read_array(parts[4], f"{where}: the inputs"))
    if len(retries) != len(chunks) or (inputs is not None and len(inputs) != len(chunks)):
        raise MessageError(f"{where} must have as many retries and inputs as chunks, which are {len(chunks)}")
    return PackedGroup(submission, done, chunks, retries, inputs)


def _chunk(fields: dict[object, object]) -> Chunk:
    return Chunk(
        read_integer(field(fields, "submission_id", "chunk"), 0, U63_MAX, "chunk.submission_id"),
        read_integer(field(fields, "chunk_index", "chunk"), 0, U63_MAX, "chunk.chunk_index"),
        read_optional(fields.get("input_content"), "chunk.input_content", read_bytes),
        read_integer(field(fields, "retries", "chunk"), -(2**63), U63_MAX, "chunk.retries"),
    )


def _submission(fields: dict[object, object]) -> Submission:
    where = "submission"
    strategic = read_map(field(fields, "strategic_metadata", where), "submission.strategic_metadata")
    return Submission(
        read_integer(field(fields, "id", where), 0, U63_MAX, "submission.id"),
        read_optional(fields.get("prefix"), "submission.prefix", read_text),
        read_integer(field(fields, "chunks_total", where), 0, U63_MAX, "submission.chunks_total"),
        read_integer(field(fields, "chunks_done", where), 0, U63_MAX, "submission.chunks_done"),
        read_integer(field(fields, "chunk_size", where), -(2**63), U63_MAX, "submission.chunk_size"),
        read_optional(fields.get("metadata"), "submission.metadata", read_bytes),
        {
            read_text(key, "submission.strategic_metadata"): read_integer(
                value, -(2**63), U63_MAX, "submission.strategic_metadata"
            )
            for key, value in strategic.items()
        },
        read_text(field(fields, "otel_trace_carrier", where), "submission.otel_trace_carrier"),
    )
