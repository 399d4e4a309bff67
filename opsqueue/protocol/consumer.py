"""Consumers' messages as types, decoded from and encoded to CBOR; no WebSocket, no I/O.

The general decoder: it reads whatever the protocol allows (byte strings or arrays of integers, maps in any order, extra
fields) and raises MessageError for everything else. The server reads its hot messages with a decoder of its own.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn, TypeAlias, TypeVar, cast

import cbor2

from opsqueue.protocol import strategy as strategies
from opsqueue.protocol.errors import MessageError, StrategyError, UnservableRequestError
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
#: Every extension of this version, as they stand in the header and in Init.
FEATURES: Final = (CLEAN_CLOSE, REFUSAL, DROPPED, RELEASE, EXTEND, RETRY_LATER, FAIL_SUBMISSION)

DropReason: TypeAlias = Literal["cancelled", "failed", "completed", "expired"]
_DROP_REASONS: dict[str, DropReason] = {name: name for name in ("cancelled", "failed", "completed", "expired")}

U32_MAX: Final = 2**32 - 1
U63_MAX: Final = 2**63 - 1
U64_MAX: Final = 2**64 - 1
_NANOS: Final = 1_000_000_000
#: Containers in containers: a strategy needs 2 for each PreferDistinct, everything else fewer than 10.
_MAX_DEPTH: Final = 100


@dataclass(frozen=True, slots=True, order=True)
class ChunkId:
    """Which chunk a message is about."""

    submission_id: int
    chunk_index: int


@dataclass(frozen=True, slots=True)
class WantToReserveChunks:
    """Asks for 1 to `max` chunks; answered once, when there is work."""

    max: int
    strategy: Strategy


@dataclass(frozen=True, slots=True)
class CompleteChunk:
    """The chunk is done; its output goes along exactly when its input came inside the message."""

    id: ChunkId
    output_content: bytes | None


@dataclass(frozen=True, slots=True)
class FailChunk:
    """The chunk failed, with the text why."""

    id: ChunkId
    failure: str


@dataclass(frozen=True, slots=True)
class WorkingOn:
    """The callback of this chunk begins (feature clean-close)."""

    id: ChunkId


@dataclass(frozen=True, slots=True)
class ReleaseChunk:
    """Gives the chunk back without counting a retry (feature release)."""

    id: ChunkId


@dataclass(frozen=True, slots=True)
class ExtendReservation:
    """Starts the reservation's time again (feature extend)."""

    id: ChunkId


@dataclass(frozen=True, slots=True)
class RetryLater:
    """Gives the chunk back, to be handed out after `delay_ms` milliseconds (feature retry-later)."""

    id: ChunkId
    delay_ms: int


@dataclass(frozen=True, slots=True)
class FailSubmission:
    """Fails the chunk's submission at once, whatever retries are left (feature fail-submission)."""

    id: ChunkId
    reason: str


ClientContents: TypeAlias = (
    WantToReserveChunks
    | CompleteChunk
    | FailChunk
    | WorkingOn
    | ReleaseChunk
    | ExtendReservation
    | RetryLater
    | FailSubmission
)


@dataclass(frozen=True, slots=True)
class ClientMessage:
    """One frame of a consumer."""

    nonce: int
    contents: ClientContents


@dataclass(frozen=True, slots=True)
class Init:
    """The first frame of a server. Durations in nanoseconds; `features` is None for a server without extensions."""

    max_missable_heartbeats: int
    heartbeat_interval_ns: int
    version_info: str
    conn_id: str
    features: tuple[str, ...] | None = None
    reservation_expiration_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A reserved chunk; `input_content` is None when it stands in the object store."""

    submission_id: int
    chunk_index: int
    input_content: bytes | None
    retries: int


@dataclass(frozen=True, slots=True)
class Submission:
    """The unfinished submission of a reserved chunk."""

    id: int
    prefix: str | None
    chunks_total: int
    chunks_done: int
    chunk_size: int
    metadata: bytes | None
    strategic_metadata: dict[str, int]
    otel_trace_carrier: str


@dataclass(frozen=True, slots=True)
class ChunksReserved:
    """The answer to WantToReserveChunks; `chunks` is None when `max` was 0."""

    nonce: int
    chunks: list[tuple[Chunk, Submission]] | None


@dataclass(frozen=True, slots=True)
class ReservationRefused:
    """The request can never be served (feature refusal)."""

    nonce: int
    reason: str


@dataclass(frozen=True, slots=True)
class ChunkReservationExpired:
    """The reservation outlived its time; the chunk is no longer held."""

    id: ChunkId


@dataclass(frozen=True, slots=True)
class ChunkDropped:
    """The chunk is no longer held, and why (feature dropped)."""

    id: ChunkId
    reason: DropReason


ServerMessage: TypeAlias = Init | ChunksReserved | ReservationRefused | ChunkReservationExpired | ChunkDropped


def decode_client(data: bytes) -> ClientMessage:
    """A consumer's frame. Raises MessageError; UnservableRequestError when only the strategy is at fault."""
    message = _map(_cbor(data), "message")
    nonce = _integer(_get(message, "nonce", "message"), 0, U64_MAX, "nonce")
    name, body = _variant(_get(message, "contents", "message"), "contents")
    reader = _CLIENT_READERS.get(name)
    if reader is None:
        raise MessageError(f"contents is {_shown(name)}: known are {', '.join(_CLIENT_READERS)}")
    fields = _map(body, name)
    try:
        return ClientMessage(nonce, reader(fields))
    except StrategyError as error:
        raise UnservableRequestError(nonce, str(error)) from None


def decode_server(data: bytes) -> ServerMessage:
    """A server's frame. Raises MessageError."""
    name, body = _variant(_cbor(data), "message")
    match name:
        case "Init":
            return _init(_map(body, "Init"))
        case "Sync":
            return _sync(_map(body, "Sync"))
        case "Async":
            return _async(body)
        case _:
            raise MessageError(f"message is {_shown(name)}: known are Init, Sync and Async")


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
                result = {"Ok": [[_fields(chunk), _fields(submission)] for chunk, submission in chunks]}
            return cbor2.dumps({"Sync": {"nonce": nonce, "contents": {"ChunksReserved": result}}})
        case ReservationRefused(nonce=nonce, reason=reason):
            return cbor2.dumps({"Sync": {"nonce": nonce, "contents": {"ReservationRefused": {"reason": reason}}}})
        case ChunkReservationExpired(id=chunk_id):
            return cbor2.dumps({"Async": {"ChunkReservationExpired": _id_to_wire(chunk_id)}})
        case ChunkDropped(id=chunk_id, reason=drop_reason):
            return cbor2.dumps({"Async": {"ChunkDropped": {**_id_to_wire(chunk_id), "reason": drop_reason}}})


def _fields(value: Chunk | Submission) -> dict[str, object]:
    return {name: getattr(value, name) for name in value.__slots__}


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


def _refuse_tag(*_args: object) -> NoReturn:
    raise ValueError("a CBOR tag, which no message has")


#: Tags that cbor2 would turn into values of its own; the others go to the tag hook.
_KNOWN_TAGS = (0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 100, 256, 258, 260, 261, 1004, 43000, 55799)
_NO_TAGS: dict[int, Callable[..., Any]] = dict.fromkeys(_KNOWN_TAGS, _refuse_tag)


def _cbor(data: bytes) -> object:
    source = io.BytesIO(data)
    decoder = cbor2.CBORDecoder(
        source,
        tag_hook=_refuse_tag,
        semantic_decoders=_NO_TAGS,
        max_depth=_MAX_DEPTH,
        allow_duplicate_keys=False,
        strict_hashable_types=True,
    )
    try:
        value: object = decoder.decode()
    except cbor2.CBORDecodeEOF:
        raise MessageError(f"the frame of {len(data)} bytes ends inside its CBOR item") from None
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise MessageError(f"the frame of {len(data)} bytes is not a CBOR item: {error.__cause__ or error}") from None
    if source.tell() != len(data):
        raise MessageError(f"the frame has {len(data) - source.tell()} bytes after its CBOR item")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _map(value: object, where: str) -> dict[object, object]:
    if not isinstance(value, dict):
        raise MessageError(f"{where} must be a map, not {_shown(value)}")
    return value


def _get(fields: dict[object, object], name: str, where: str) -> object:
    try:
        return fields[name]
    except KeyError:
        raise MessageError(f"{where} lacks {name}") from None


def _variant(value: object, where: str) -> tuple[str, object]:
    if isinstance(value, str):
        return value, None
    if not isinstance(value, dict) or len(value) != 1:
        raise MessageError(f"{where} must be a text or a map with one key, not {_shown(value)}")
    ((name, body),) = value.items()
    if not isinstance(name, str):
        raise MessageError(f"{where} has the key {_shown(name)}, which must be a text")
    return name, body


def _integer(value: object, low: int, high: int, where: str) -> int:
    if type(value) is not int:
        raise MessageError(f"{where} must be an integer, not {_shown(value)}")
    if not low <= value <= high:
        raise MessageError(f"{where} is {value}, it may be {low} to {high}")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise MessageError(f"{where} must be a text, not {_shown(value)}")
    return value


def _bytes(value: object, where: str) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, list):
        if not set(map(type, value)) <= {int}:
            raise MessageError(f"{where} must be an array of integers or a byte string")
        try:
            return bytes(value)
        except ValueError:
            raise MessageError(f"{where} has an integer that is not 0 to 255") from None
    raise MessageError(f"{where} must be a byte string or an array of integers, not {_shown(value)}")


T = TypeVar("T")


def _optional(value: object, where: str, read: Callable[[object, str], T]) -> T | None:
    return None if value is None else read(value, where)


def _chunk_id(value: object, where: str) -> ChunkId:
    fields = _map(value, where)
    return ChunkId(
        _integer(_get(fields, "submission_id", where), 0, U63_MAX, f"{where}.submission_id"),
        _integer(_get(fields, "chunk_index", where), 0, U63_MAX, f"{where}.chunk_index"),
    )


def _duration(value: object, where: str) -> int:
    fields = _map(value, where)
    seconds = _integer(_get(fields, "secs", where), 0, U64_MAX, f"{where}.secs")
    return seconds * _NANOS + _integer(_get(fields, "nanos", where), 0, U32_MAX, f"{where}.nanos")


def _want(fields: dict[object, object]) -> ClientContents:
    where = "WantToReserveChunks"
    maximum = _integer(_get(fields, "max", where), 0, U64_MAX, f"{where}.max")
    return WantToReserveChunks(maximum, strategies.parse(_get(fields, "strategy", where)))


def _complete(fields: dict[object, object]) -> ClientContents:
    where = "CompleteChunk"
    chunk_id = _chunk_id(_get(fields, "id", where), f"{where}.id")
    return CompleteChunk(chunk_id, _optional(fields.get("output_content"), f"{where}.output_content", _bytes))


def _fail(fields: dict[object, object]) -> ClientContents:
    chunk_id = _chunk_id(_get(fields, "id", "FailChunk"), "FailChunk.id")
    return FailChunk(chunk_id, _text(_get(fields, "failure", "FailChunk"), "FailChunk.failure"))


def _retry_later(fields: dict[object, object]) -> ClientContents:
    chunk_id = _chunk_id(_get(fields, "id", "RetryLater"), "RetryLater.id")
    delay = _integer(_get(fields, "delay_ms", "RetryLater"), 0, U63_MAX, "RetryLater.delay_ms")
    return RetryLater(chunk_id, delay)


def _fail_submission(fields: dict[object, object]) -> ClientContents:
    chunk_id = _chunk_id(_get(fields, "id", "FailSubmission"), "FailSubmission.id")
    return FailSubmission(chunk_id, _text(_get(fields, "reason", "FailSubmission"), "FailSubmission.reason"))


def _only_id(
    message: type[WorkingOn | ReleaseChunk | ExtendReservation],
) -> Callable[[dict[object, object]], ClientContents]:
    where = message.__name__

    def read(fields: dict[object, object]) -> ClientContents:
        return message(_chunk_id(_get(fields, "id", where), f"{where}.id"))

    return read


_CLIENT_READERS: dict[str, Callable[[dict[object, object]], ClientContents]] = {
    "WantToReserveChunks": _want,
    "CompleteChunk": _complete,
    "FailChunk": _fail,
    "WorkingOn": _only_id(WorkingOn),
    "ReleaseChunk": _only_id(ReleaseChunk),
    "ExtendReservation": _only_id(ExtendReservation),
    "RetryLater": _retry_later,
    "FailSubmission": _fail_submission,
}


def _init(fields: dict[object, object]) -> Init:
    features: tuple[str, ...] | None = None
    if fields.get("features") is not None:
        listed = _array(fields["features"], "Init.features")
        features = tuple(_text(feature, "Init.features") for feature in listed)
    return Init(
        _integer(_get(fields, "max_missable_heartbeats", "Init"), 0, U64_MAX, "Init.max_missable_heartbeats"),
        _duration(_get(fields, "heartbeat_interval", "Init"), "Init.heartbeat_interval"),
        _text(_get(fields, "version_info", "Init"), "Init.version_info"),
        _text(_get(fields, "conn_id", "Init"), "Init.conn_id"),
        features,
        _optional(fields.get("reservation_expiration"), "Init.reservation_expiration", _duration),
    )


def _sync(fields: dict[object, object]) -> ServerMessage:
    nonce = _integer(_get(fields, "nonce", "Sync"), 0, U64_MAX, "Sync.nonce")
    name, body = _variant(_get(fields, "contents", "Sync"), "Sync.contents")
    if name == "ReservationRefused":
        return ReservationRefused(nonce, _text(_get(_map(body, name), "reason", name), f"{name}.reason"))
    if name != "ChunksReserved":
        raise MessageError(f"Sync.contents is {_shown(name)}: known are ChunksReserved and ReservationRefused")
    result, value = _variant(body, name)
    if result == "Err":
        return ChunksReserved(nonce, None)
    if result != "Ok":
        raise MessageError(f"ChunksReserved is {_shown(result)}: known are Ok and Err")
    return ChunksReserved(nonce, [_pair(item) for item in _array(value, "ChunksReserved.Ok")])


def _async(value: object) -> ServerMessage:
    name, body = _variant(value, "Async")
    if name == "ChunkReservationExpired":
        return ChunkReservationExpired(_chunk_id(body, name))
    if name != "ChunkDropped":
        raise MessageError(f"Async is {_shown(name)}: known are ChunkReservationExpired and ChunkDropped")
    reason = _text(_get(_map(body, name), "reason", name), f"{name}.reason")
    if reason not in _DROP_REASONS:
        raise MessageError(f"ChunkDropped.reason is {_shown(reason)}: known are {', '.join(_DROP_REASONS)}")
    return ChunkDropped(_chunk_id(body, name), _DROP_REASONS[reason])


def _array(value: object, where: str) -> Sequence[object]:
    if not isinstance(value, list):
        raise MessageError(f"{where} must be an array, not {_shown(value)}")
    return cast("list[object]", value)


def _pair(value: object) -> tuple[Chunk, Submission]:
    pair = _array(value, "ChunksReserved.Ok[]")
    if len(pair) != 2:
        raise MessageError(f"ChunksReserved.Ok[] must be a chunk and its submission, not {len(pair)} items")
    return _chunk(_map(pair[0], "chunk")), _submission(_map(pair[1], "submission"))


def _chunk(fields: dict[object, object]) -> Chunk:
    return Chunk(
        _integer(_get(fields, "submission_id", "chunk"), 0, U63_MAX, "chunk.submission_id"),
        _integer(_get(fields, "chunk_index", "chunk"), 0, U63_MAX, "chunk.chunk_index"),
        _optional(fields.get("input_content"), "chunk.input_content", _bytes),
        _integer(_get(fields, "retries", "chunk"), -(2**63), U63_MAX, "chunk.retries"),
    )


def _submission(fields: dict[object, object]) -> Submission:
    where = "submission"
    strategic = _map(_get(fields, "strategic_metadata", where), "submission.strategic_metadata")
    return Submission(
        _integer(_get(fields, "id", where), 0, U63_MAX, "submission.id"),
        _optional(fields.get("prefix"), "submission.prefix", _text),
        _integer(_get(fields, "chunks_total", where), 0, U63_MAX, "submission.chunks_total"),
        _integer(_get(fields, "chunks_done", where), 0, U63_MAX, "submission.chunks_done"),
        _integer(_get(fields, "chunk_size", where), -(2**63), U63_MAX, "submission.chunk_size"),
        _optional(fields.get("metadata"), "submission.metadata", _bytes),
        {
            _text(key, "submission.strategic_metadata"): _integer(
                value, -(2**63), U63_MAX, "submission.strategic_metadata"
            )
            for key, value in strategic.items()
        },
        _text(_get(fields, "otel_trace_carrier", where), "submission.otel_trace_carrier"),
    )
