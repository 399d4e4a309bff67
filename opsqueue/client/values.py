"""The values that users of the client library see: frozen, picklable, compared and hashed by value. No I/O.

Variants are nested subclasses of their parent: `isinstance(status, SubmissionStatus.Failed)`, `case Strategy.Oldest()`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, ClassVar, TypeAlias, TypeVar

import msgspec
from msgspec.structs import force_setattr

from opsqueue.exceptions import TryFromIntError
from opsqueue.protocol import strategy as wire

__all__ = [
    "Chunk",
    "ChunkFailed",
    "ChunkIndex",
    "Strategy",
    "Submission",
    "SubmissionCancelled",
    "SubmissionCompleted",
    "SubmissionFailed",
    "SubmissionId",
    "SubmissionNotCancellable",
    "SubmissionStatus",
]

_U63_END = 2**63
_U64_END = 2**64


def _u63(value: object, what: str) -> int:
    number = operator.index(value)  # type: ignore[arg-type]  # a TypeError of its own for anything but an integer
    if 0 <= number < _U63_END:
        return number
    if 0 <= number < _U64_END:
        raise TryFromIntError(f"{what} {number} is too large: the largest is {_U63_END - 1}")
    raise OverflowError(f"{what} {number} is out of range: it may be 0 to {_U63_END - 1}")


class SubmissionId(msgspec.Struct, frozen=True, order=True):
    """Identifies a submission: `id` is a number from 0 to 2^63-1, ordered by the time of insertion.

    Raises TryFromIntError from 2^63 to 2^64-1, OverflowError for a negative or larger number.
    """

    id: int

    def __post_init__(self) -> None:
        force_setattr(self, "id", _u63(self.id, "the submission id"))

    def __int__(self) -> int:
        return self.id


class ChunkIndex(msgspec.Struct, frozen=True, order=True):
    """A chunk's place in its submission: `id` is a number from 0 to 2^63-1. Raises as `SubmissionId` does."""

    id: int

    def __post_init__(self) -> None:
        force_setattr(self, "id", _u63(self.id, "the chunk index"))

    def __int__(self) -> int:
        return self.id


class _Matched(msgspec.StructMeta):
    """Lets patterns name the fields by their places, also where the constructor wants their names."""

    @property
    def __match_args__(cls) -> tuple[str, ...]:  # type: ignore[override]  # msgspec's cannot be written either
        return cls.__struct_fields__


class _Variants(msgspec.Struct, frozen=True, metaclass=_Matched):
    """A parent that has no instances of its own: only its nested subclasses do."""

    def __post_init__(self) -> None:
        if _Variants in type(self).__bases__:
            raise TypeError(f"{type(self).__name__} cannot be instantiated; use one of its variants")

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__struct_fields__)
        return f"{type(self).__qualname__}({fields})"


V = TypeVar("V", bound=type)


def _nested(parent: type) -> Callable[[V], V]:
    """Makes the decorated class an attribute of `parent`, under the name that its `__qualname__` ends with."""

    def nest(variant: V) -> V:
        name = variant.__name__.removeprefix(parent.__name__)
        variant.__name__ = name
        variant.__qualname__ = f"{parent.__qualname__}.{name}"
        setattr(parent, name, variant)
        return variant

    return nest


class Strategy(_Variants, frozen=True):
    """In which order a consumer wants its chunks."""

    Oldest: ClassVar[type[StrategyOldest]]
    Newest: ClassVar[type[StrategyNewest]]
    Random: ClassVar[type[StrategyRandom]]
    PreferDistinct: ClassVar[type[StrategyPreferDistinct]]
    Highest: ClassVar[type[StrategyHighest]]
    Lowest: ClassVar[type[StrategyLowest]]
    SelectOnly: ClassVar[type[StrategySelectOnly]]
    MaxSimultaneous: ClassVar[type[StrategyMaxSimultaneous]]
    OrElse: ClassVar[type[StrategyOrElse]]

    def to_protocol(self) -> wire.Strategy:
        """The same strategy as the protocol's type. Raises TypeError for what is no variant."""
        raise TypeError(f"{type(self).__name__} is not a variant of Strategy")


@_nested(Strategy)
class StrategyOldest(Strategy, frozen=True):
    """The oldest submission first, its chunks ascending."""

    def __repr__(self) -> str:
        return "Strategy.Oldest"

    def to_protocol(self) -> wire.Strategy:
        return wire.Oldest()


@_nested(Strategy)
class StrategyNewest(Strategy, frozen=True):
    """The newest submission first, its chunks descending."""

    def __repr__(self) -> str:
        return "Strategy.Newest"

    def to_protocol(self) -> wire.Strategy:
        return wire.Newest()


@_nested(Strategy)
class StrategyRandom(Strategy, frozen=True):
    """Any available chunk, each as likely as every other."""

    def __repr__(self) -> str:
        return "Strategy.Random"

    def to_protocol(self) -> wire.Strategy:
        return wire.Random()


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _check_key(meta_key: object) -> None:
    if not isinstance(meta_key, str):
        raise TypeError(f"meta_key must be a str, not {meta_key!r}")


def _check_strategy(name: str, given: object) -> None:
    if not isinstance(given, Strategy):
        raise TypeError(f"{name} must be a Strategy such as Strategy.Oldest(), not {given!r}")


def _check_integer(name: str, given: object, least: int, most: int) -> None:
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{name} must be an int, not {given!r}")
    if not least <= given <= most:
        raise ValueError(f"{name} must be from {least} to {most}, not {given}")


@_nested(Strategy)
class StrategyPreferDistinct(Strategy, frozen=True, kw_only=True):
    """First the values of strategic metadata `meta_key` with the fewest chunks in flight, then `underlying`."""

    meta_key: str
    underlying: Strategy

    def __post_init__(self) -> None:
        _check_key(self.meta_key)
        _check_strategy("underlying", self.underlying)

    def __repr__(self) -> str:
        return f"Strategy.PreferDistinct {{ meta_key: {_quoted(self.meta_key)}, underlying: {self.underlying!r} }}"

    def to_protocol(self) -> wire.Strategy:
        return wire.PreferDistinct(self.meta_key, self.underlying.to_protocol())


@_nested(Strategy)
class StrategyHighest(Strategy, frozen=True, kw_only=True):
    """The largest value of strategic metadata `meta_key` first, then the oldest; submissions without a value last."""

    meta_key: str

    def __post_init__(self) -> None:
        _check_key(self.meta_key)

    def __repr__(self) -> str:
        return f"Strategy.Highest {{ meta_key: {_quoted(self.meta_key)} }}"

    def to_protocol(self) -> wire.Strategy:
        return wire.Highest(self.meta_key)


@_nested(Strategy)
class StrategyLowest(Strategy, frozen=True, kw_only=True):
    """The smallest value of strategic metadata `meta_key` first, then the oldest; submissions without a value last."""

    meta_key: str

    def __post_init__(self) -> None:
        _check_key(self.meta_key)

    def __repr__(self) -> str:
        return f"Strategy.Lowest {{ meta_key: {_quoted(self.meta_key)} }}"

    def to_protocol(self) -> wire.Strategy:
        return wire.Lowest(self.meta_key)


@_nested(Strategy)
class StrategySelectOnly(Strategy, frozen=True, kw_only=True):
    """Only submissions whose strategic metadata `meta_key` is `value` (64 bits), in the order of `underlying`."""

    meta_key: str
    value: int
    underlying: Strategy

    def __post_init__(self) -> None:
        _check_key(self.meta_key)
        _check_integer("value", self.value, -(2**63), 2**63 - 1)
        _check_strategy("underlying", self.underlying)

    def __repr__(self) -> str:
        return (
            f"Strategy.SelectOnly {{ meta_key: {_quoted(self.meta_key)}, value: {self.value}, "
            f"underlying: {self.underlying!r} }}"
        )

    def to_protocol(self) -> wire.Strategy:
        return wire.SelectOnly(self.meta_key, self.value, self.underlying.to_protocol())


@_nested(Strategy)
class StrategyMaxSimultaneous(Strategy, frozen=True, kw_only=True):
    """Only submissions whose value of `meta_key` has fewer than `limit` chunks in flight, whoever holds them.

    They are taken in the order of `underlying`. Submissions without the key are not limited. The limit (1 to 2^32-1)
    binds only the requests that carry it, and is looked at anew for each chunk of a reservation; a request that it
    holds back waits.
    """

    meta_key: str
    limit: int
    underlying: Strategy

    def __post_init__(self) -> None:
        _check_key(self.meta_key)
        _check_integer("limit", self.limit, 1, 2**32 - 1)
        _check_strategy("underlying", self.underlying)

    def __repr__(self) -> str:
        return (
            f"Strategy.MaxSimultaneous {{ meta_key: {_quoted(self.meta_key)}, limit: {self.limit}, "
            f"underlying: {self.underlying!r} }}"
        )

    def to_protocol(self) -> wire.Strategy:
        return wire.MaxSimultaneous(self.meta_key, self.limit, self.underlying.to_protocol())


@_nested(Strategy)
class StrategyOrElse(Strategy, frozen=True, kw_only=True):
    """`second` where `first` has no chunk, looked at anew for each chunk of a reservation."""

    first: Strategy
    second: Strategy

    def __post_init__(self) -> None:
        _check_strategy("first", self.first)
        _check_strategy("second", self.second)

    def __repr__(self) -> str:
        return f"Strategy.OrElse {{ first: {self.first!r}, second: {self.second!r} }}"

    def to_protocol(self) -> wire.Strategy:
        return wire.OrElse(self.first.to_protocol(), self.second.to_protocol())


class _HashedById:
    """Equal by all fields, hashed by the id alone: dicts cannot be hashed."""

    __slots__ = ()
    id: SubmissionId

    def __hash__(self) -> int:
        return hash(self.id)


class Chunk(msgspec.Struct, frozen=True):
    """A reserved chunk: the one at `chunk_index` (from 0) of the submission `submission_id`.

    `input_content` is its encoded operations, `retries` how often it has failed before. `submission_prefix` is the
    place of its submission in the object store, None for one whose chunks travel in messages. `submission_metadata` is
    what the producer gave, `submission_otel_trace_carrier` the trace context in which it inserted the submission.
    """

    submission_id: SubmissionId
    chunk_index: ChunkIndex
    input_content: bytes
    retries: int
    submission_prefix: str | None
    submission_metadata: bytes | None
    submission_otel_trace_carrier: dict[str, str]

    def __hash__(self) -> int:
        return hash((self.submission_id, self.chunk_index))


class Submission(_HashedById, msgspec.Struct, frozen=True, kw_only=True):
    """A submission in progress or paused.

    `id` and `prefix` identify it; `prefix` is the place of its chunks in the object store, None when they travel in
    messages. `chunks_total` chunks of `chunk_size` operations (a hint), `chunks_done` of them done. `metadata` and
    `strategic_metadata` are what the producer gave. `otel_trace_carrier` is the trace context of the insert.
    """

    id: SubmissionId
    chunks_total: int
    chunks_done: int
    metadata: bytes | None
    strategic_metadata: dict[str, int]
    prefix: str | None
    chunk_size: int
    otel_trace_carrier: dict[str, str]


class SubmissionCompleted(_HashedById, msgspec.Struct, frozen=True, kw_only=True):
    """A submission whose chunks are all done, since `completed_at` (UTC). The other fields as `Submission` has them."""

    id: SubmissionId
    chunks_total: int
    metadata: bytes | None
    strategic_metadata: dict[str, int]
    completed_at: datetime
    prefix: str | None
    chunk_size: int
    otel_trace_carrier: dict[str, str]


class SubmissionFailed(_HashedById, msgspec.Struct, frozen=True, kw_only=True):
    """A submission one chunk of which, at index `failed_chunk_id`, failed for good at `failed_at` (UTC).

    `chunks_done` is None when the server does not tell. The other fields as `Submission` has them.
    """

    id: SubmissionId
    chunks_total: int
    chunks_done: int | None
    metadata: bytes | None
    strategic_metadata: dict[str, int]
    failed_at: datetime
    failed_chunk_id: int
    prefix: str | None
    chunk_size: int
    otel_trace_carrier: dict[str, str]


class SubmissionCancelled(_HashedById, msgspec.Struct, frozen=True, kw_only=True):
    """A submission that a producer cancelled at `cancelled_at` (UTC).

    `chunk_size` and `otel_trace_carrier` are None: they are not known. The other fields as `Submission` has them.
    """

    id: SubmissionId
    chunks_total: int
    chunks_done: int
    metadata: bytes | None
    strategic_metadata: dict[str, int]
    cancelled_at: datetime
    prefix: str | None
    chunk_size: int | None = None
    otel_trace_carrier: dict[str, str] | None = None


class ChunkFailed(msgspec.Struct, frozen=True, kw_only=True):
    """The chunk that made its submission fail: the one at `chunk_index` of the submission `submission_id`.

    `failure` is the text of its last failure, mostly a traceback; `failed_at` is its time (UTC).
    """

    submission_id: SubmissionId
    chunk_index: ChunkIndex
    failure: str
    failed_at: datetime


AnySubmission: TypeAlias = Submission | SubmissionCompleted | SubmissionFailed | SubmissionCancelled


class SubmissionStatus(_Variants, frozen=True):
    """How far a submission is: one of the nested variants, each with `.submission`."""

    InProgress: ClassVar[type[SubmissionStatusInProgress]]
    Paused: ClassVar[type[SubmissionStatusPaused]]
    Completed: ClassVar[type[SubmissionStatusCompleted]]
    Failed: ClassVar[type[SubmissionStatusFailed]]
    Cancelled: ClassVar[type[SubmissionStatusCancelled]]

    if TYPE_CHECKING:

        @property
        def submission(self) -> AnySubmission:
            """What it is the status of."""


@_nested(SubmissionStatus)
class SubmissionStatusInProgress(SubmissionStatus, frozen=True):
    """Chunks of `submission` are handed out, or wait to be."""

    submission: Submission


@_nested(SubmissionStatus)
class SubmissionStatusPaused(SubmissionStatusInProgress, frozen=True):
    """As `SubmissionStatus.InProgress`, but no chunk is handed out until it is unpaused."""


@_nested(SubmissionStatus)
class SubmissionStatusCompleted(SubmissionStatus, frozen=True):
    """All chunks of `submission` are done."""

    submission: SubmissionCompleted


@_nested(SubmissionStatus)
class SubmissionStatusFailed(SubmissionStatus, frozen=True):
    """One chunk of `submission` failed for good: `chunk`."""

    submission: SubmissionFailed
    chunk: ChunkFailed


@_nested(SubmissionStatus)
class SubmissionStatusCancelled(SubmissionStatus, frozen=True):
    """A producer cancelled `submission`."""

    submission: SubmissionCancelled


class SubmissionNotCancellable(_Variants, frozen=True):
    """Why a submission cannot be cancelled: how it had ended before."""

    Completed: ClassVar[type[SubmissionNotCancellableCompleted]]
    Failed: ClassVar[type[SubmissionNotCancellableFailed]]
    Cancelled: ClassVar[type[SubmissionNotCancellableCancelled]]

    if TYPE_CHECKING:

        @property
        def submission(self) -> SubmissionCompleted | SubmissionFailed | SubmissionCancelled:
            """What cannot be cancelled."""


@_nested(SubmissionNotCancellable)
class SubmissionNotCancellableCompleted(SubmissionNotCancellable, frozen=True):
    """`submission` is completed."""

    submission: SubmissionCompleted


@_nested(SubmissionNotCancellable)
class SubmissionNotCancellableFailed(SubmissionNotCancellable, frozen=True):
    """`submission` has failed, by `chunk`."""

    submission: SubmissionFailed
    chunk: ChunkFailed


@_nested(SubmissionNotCancellable)
class SubmissionNotCancellableCancelled(SubmissionNotCancellable, frozen=True):
    """`submission` was cancelled before."""

    submission: SubmissionCancelled
