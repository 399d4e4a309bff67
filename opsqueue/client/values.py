"""The values that users of the client library see: frozen, picklable, compared and hashed by value. No I/O.

Variants are nested subclasses of their parent: `isinstance(status, SubmissionStatus.Failed)`, `case Strategy.Oldest()`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, Self, TypeAlias, TypeVar

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


@dataclass(frozen=True, slots=True, order=True, repr=False)
class SubmissionId:
    """Identifies a submission: `id` is a number from 0 to 2^63-1, ordered by the time of insertion.

    Raises TryFromIntError from 2^63 to 2^64-1, OverflowError for a negative or larger number.
    """

    __match_args__ = ()
    id: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", _u63(self.id, "the submission id"))

    def __int__(self) -> int:
        return self.id

    def __repr__(self) -> str:
        return f"SubmissionId(id={self.id})"


@dataclass(frozen=True, slots=True, order=True, repr=False)
class ChunkIndex:
    """A chunk's place in its submission: `id` is a number from 0 to 2^63-1. Raises as `SubmissionId` does."""

    __match_args__ = ()
    id: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", _u63(self.id, "the chunk index"))

    def __int__(self) -> int:
        return self.id

    def __repr__(self) -> str:
        return f"ChunkIndex(id={self.id})"


class _Variants:
    """A parent that has no instances of its own: only its nested subclasses do."""

    __slots__ = ()

    def __new__(cls, *_args: object, **_kwargs: object) -> Self:
        if _Variants in cls.__bases__:
            raise TypeError(f"{cls.__name__} cannot be instantiated; use one of its variants")
        return super().__new__(cls)


V = TypeVar("V", bound=type)


def _nested(parent: type) -> Any:
    """Makes the decorated class an attribute of `parent`, under the name that its `__qualname__` ends with."""

    def nest(variant: V) -> V:
        name = variant.__name__.removeprefix(parent.__name__)
        variant.__name__ = name
        variant.__qualname__ = f"{parent.__qualname__}.{name}"
        setattr(parent, name, variant)
        return variant

    return nest


class Strategy(_Variants):
    """In which order a consumer wants its chunks."""

    __slots__ = ()
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
@dataclass(frozen=True, slots=True, repr=False)
class StrategyOldest(Strategy):
    """The oldest submission first, its chunks ascending."""

    def __repr__(self) -> str:
        return "Strategy.Oldest"

    def to_protocol(self) -> wire.Strategy:
        return wire.Oldest()


@_nested(Strategy)
@dataclass(frozen=True, slots=True, repr=False)
class StrategyNewest(Strategy):
    """The newest submission first, its chunks descending."""

    def __repr__(self) -> str:
        return "Strategy.Newest"

    def to_protocol(self) -> wire.Strategy:
        return wire.Newest()


@_nested(Strategy)
@dataclass(frozen=True, slots=True, repr=False)
class StrategyRandom(Strategy):
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
@dataclass(frozen=True, slots=True, repr=False)
class StrategyPreferDistinct(Strategy):
    """First the values of strategic metadata `meta_key` with the fewest chunks in flight, then `underlying`."""

    __match_args__ = ("meta_key", "underlying")
    meta_key: str = field(kw_only=True)
    underlying: Strategy = field(kw_only=True)

    def __post_init__(self) -> None:
        _check_key(self.meta_key)
        _check_strategy("underlying", self.underlying)

    def __repr__(self) -> str:
        return f"Strategy.PreferDistinct {{ meta_key: {_quoted(self.meta_key)}, underlying: {self.underlying!r} }}"

    def to_protocol(self) -> wire.Strategy:
        return wire.PreferDistinct(self.meta_key, self.underlying.to_protocol())


@_nested(Strategy)
@dataclass(frozen=True, slots=True, repr=False)
class StrategyHighest(Strategy):
    """The largest value of strategic metadata `meta_key` first, then the oldest; submissions without a value last."""

    __match_args__ = ("meta_key",)
    meta_key: str = field(kw_only=True)

    def __post_init__(self) -> None:
        _check_key(self.meta_key)

    def __repr__(self) -> str:
        return f"Strategy.Highest {{ meta_key: {_quoted(self.meta_key)} }}"

    def to_protocol(self) -> wire.Strategy:
        return wire.Highest(self.meta_key)


@_nested(Strategy)
@dataclass(frozen=True, slots=True, repr=False)
class StrategyLowest(Strategy):
    """The smallest value of strategic metadata `meta_key` first, then the oldest; submissions without a value last."""

    __match_args__ = ("meta_key",)
    meta_key: str = field(kw_only=True)

    def __post_init__(self) -> None:
        _check_key(self.meta_key)

    def __repr__(self) -> str:
        return f"Strategy.Lowest {{ meta_key: {_quoted(self.meta_key)} }}"

    def to_protocol(self) -> wire.Strategy:
        return wire.Lowest(self.meta_key)


@_nested(Strategy)
@dataclass(frozen=True, slots=True, repr=False)
class StrategySelectOnly(Strategy):
    """Only submissions whose strategic metadata `meta_key` is `value` (64 bits), in the order of `underlying`."""

    __match_args__ = ("meta_key", "value", "underlying")
    meta_key: str = field(kw_only=True)
    value: int = field(kw_only=True)
    underlying: Strategy = field(kw_only=True)

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
@dataclass(frozen=True, slots=True, repr=False)
class StrategyMaxSimultaneous(Strategy):
    """Only submissions whose value of `meta_key` has fewer than `limit` chunks in flight, whoever holds them.

    They are taken in the order of `underlying`. Submissions without the key are not limited. The limit (1 to 2^32-1)
    binds only the requests that carry it, and is looked at anew for each chunk of a reservation; a request that it
    holds back waits.
    """

    __match_args__ = ("meta_key", "limit", "underlying")
    meta_key: str = field(kw_only=True)
    limit: int = field(kw_only=True)
    underlying: Strategy = field(kw_only=True)

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
@dataclass(frozen=True, slots=True, repr=False)
class StrategyOrElse(Strategy):
    """`second` where `first` has no chunk, looked at anew for each chunk of a reservation."""

    __match_args__ = ("first", "second")
    first: Strategy = field(kw_only=True)
    second: Strategy = field(kw_only=True)

    def __post_init__(self) -> None:
        _check_strategy("first", self.first)
        _check_strategy("second", self.second)

    def __repr__(self) -> str:
        return f"Strategy.OrElse {{ first: {self.first!r}, second: {self.second!r} }}"

    def to_protocol(self) -> wire.Strategy:
        return wire.OrElse(self.first.to_protocol(), self.second.to_protocol())


@dataclass(frozen=True, slots=True)
class Chunk:
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
    submission_otel_trace_carrier: dict[str, str] = field(hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A submission in progress or paused.

    `id` and `prefix` identify it; `prefix` is the place of its chunks in the object store, None when they travel in
    messages. `chunks_total` chunks of `chunk_size` operations (a hint), `chunks_done` of them done. `metadata` and
    `strategic_metadata` are what the producer gave. `otel_trace_carrier` is the trace context of the insert.
    """

    id: SubmissionId
    chunks_total: int
    chunks_done: int
    metadata: bytes | None
    strategic_metadata: dict[str, int] = field(hash=False)
    prefix: str | None
    chunk_size: int
    otel_trace_carrier: dict[str, str] = field(hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmissionCompleted:
    """A submission whose chunks are all done, since `completed_at` (UTC). The other fields as `Submission` has them."""

    id: SubmissionId
    chunks_total: int
    metadata: bytes | None
    strategic_metadata: dict[str, int] = field(hash=False)
    completed_at: datetime
    prefix: str | None
    chunk_size: int
    otel_trace_carrier: dict[str, str] = field(hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmissionFailed:
    """A submission one chunk of which, at index `failed_chunk_id`, failed for good at `failed_at` (UTC).

    `chunks_done` is None when the server does not tell. The other fields as `Submission` has them.
    """

    id: SubmissionId
    chunks_total: int
    chunks_done: int | None
    metadata: bytes | None
    strategic_metadata: dict[str, int] = field(hash=False)
    failed_at: datetime
    failed_chunk_id: int
    prefix: str | None
    chunk_size: int
    otel_trace_carrier: dict[str, str] = field(hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmissionCancelled:
    """A submission that a producer cancelled at `cancelled_at` (UTC).

    `chunk_size` and `otel_trace_carrier` are None: they are not known. The other fields as `Submission` has them.
    """

    id: SubmissionId
    chunks_total: int
    chunks_done: int
    metadata: bytes | None
    strategic_metadata: dict[str, int] = field(hash=False)
    cancelled_at: datetime
    prefix: str | None
    chunk_size: int | None = None
    otel_trace_carrier: dict[str, str] | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkFailed:
    """The chunk that made its submission fail: the one at `chunk_index` of the submission `submission_id`.

    `failure` is the text of its last failure, mostly a traceback; `failed_at` is its time (UTC).
    """

    submission_id: SubmissionId
    chunk_index: ChunkIndex
    failure: str
    failed_at: datetime


AnySubmission: TypeAlias = Submission | SubmissionCompleted | SubmissionFailed | SubmissionCancelled


class SubmissionStatus(_Variants):
    """How far a submission is: one of the nested variants, each with `.submission`."""

    __slots__ = ()
    InProgress: ClassVar[type[SubmissionStatusInProgress]]
    Paused: ClassVar[type[SubmissionStatusPaused]]
    Completed: ClassVar[type[SubmissionStatusCompleted]]
    Failed: ClassVar[type[SubmissionStatusFailed]]
    Cancelled: ClassVar[type[SubmissionStatusCancelled]]


@_nested(SubmissionStatus)
@dataclass(frozen=True, slots=True)
class SubmissionStatusInProgress(SubmissionStatus):
    """Chunks of `submission` are handed out, or wait to be."""

    submission: Submission


@_nested(SubmissionStatus)
@dataclass(frozen=True, slots=True)
class SubmissionStatusPaused(SubmissionStatusInProgress):
    """As `SubmissionStatus.InProgress`, but no chunk is handed out until it is unpaused."""


@_nested(SubmissionStatus)
@dataclass(frozen=True, slots=True)
class SubmissionStatusCompleted(SubmissionStatus):
    """All chunks of `submission` are done."""

    submission: SubmissionCompleted


@_nested(SubmissionStatus)
@dataclass(frozen=True, slots=True)
class SubmissionStatusFailed(SubmissionStatus):
    """One chunk of `submission` failed for good: `chunk`."""

    submission: SubmissionFailed
    chunk: ChunkFailed


@_nested(SubmissionStatus)
@dataclass(frozen=True, slots=True)
class SubmissionStatusCancelled(SubmissionStatus):
    """A producer cancelled `submission`."""

    submission: SubmissionCancelled


class SubmissionNotCancellable(_Variants):
    """Why a submission cannot be cancelled: how it had ended before."""

    __slots__ = ()
    Completed: ClassVar[type[SubmissionNotCancellableCompleted]]
    Failed: ClassVar[type[SubmissionNotCancellableFailed]]
    Cancelled: ClassVar[type[SubmissionNotCancellableCancelled]]


@_nested(SubmissionNotCancellable)
@dataclass(frozen=True, slots=True)
class SubmissionNotCancellableCompleted(SubmissionNotCancellable):
    """`submission` is completed."""

    submission: SubmissionCompleted


@_nested(SubmissionNotCancellable)
@dataclass(frozen=True, slots=True)
class SubmissionNotCancellableFailed(SubmissionNotCancellable):
    """`submission` has failed, by `chunk`."""

    submission: SubmissionFailed
    chunk: ChunkFailed


@_nested(SubmissionNotCancellable)
@dataclass(frozen=True, slots=True)
class SubmissionNotCancellableCancelled(SubmissionNotCancellable):
    """`submission` was cancelled before."""

    submission: SubmissionCancelled
