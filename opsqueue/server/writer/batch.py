"""What the writer's loop hands to a journal and what comes back: plain values, one immutable batch at a time.

The loop decides, a journal stores. `events` is the packed log row that the engine makes (docs/journal.md): completions,
retries and crashes. Times are microseconds since the Unix epoch, ids are submission ids.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

from opsqueue.server.requests import Insert


class State(enum.IntEnum):
    """A submission's state, as stored."""

    IN_PROGRESS = 0
    PAUSED = 1
    COMPLETED = 2
    FAILED = 3
    CANCELLED = 4


@dataclass(frozen=True, slots=True)
class NewSubmission:
    """An insert under the id that the loop chose. `now_us` is the time of the decision."""

    submission: int
    insert: Insert
    now_us: int


@dataclass(frozen=True, slots=True)
class NewRetry:
    """A failed submission to be done again under the id that the loop chose; what is done stays done."""

    submission: int
    failed: int
    #: Chunks of the failed one, as the front-end read them.
    count: int
    #: Its blocks with done chunks, as (block, done) of BlockRow, while the engine has them; None: the journal's own.
    blocks: tuple[tuple[int, bytes], ...] | None = None


@dataclass(frozen=True, slots=True)
class EndedSubmission:
    """A submission that ended. `failed_chunk` and `failure` only for State.FAILED."""

    submission: int
    state: State
    chunks_done: int
    ended_us: int
    failed_chunk: int | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class PauseChange:
    submission: int
    paused: bool


@dataclass(frozen=True, slots=True)
class DirectOutput:
    submission: int
    chunk: int
    content: bytes


class BlockRow(NamedTuple):
    """4,096 chunks of a submission as they are when the batch closes.

    `done`: bit i (least significant first) of byte i // 8 = chunk block * 4096 + i is done; trimmed to the submission's
    length; empty = all done. `attempts`: per chunk with a retry or a crash, LEB128 varints (offset, retries, crashes);
    empty = none.
    """

    submission: int
    block: int
    done: bytes
    attempts: bytes


@dataclass(frozen=True, slots=True)
class Batch:
    """One transaction. Applied in this order: events, ended, cancelled, pauses, inserts, outputs, blocks, retries,
    log_through, id_mark_ms.
    """

    number: int
    events: bytes = b""
    #: Applied changes (they are true in memory already): completed and failed submissions.
    ended: tuple[EndedSubmission, ...] = ()
    #: Staged changes: take effect when the commit succeeds. Cancelled submissions.
    cancelled: tuple[EndedSubmission, ...] = ()
    pauses: tuple[PauseChange, ...] = ()
    inserts: tuple[NewSubmission, ...] = ()
    outputs: tuple[DirectOutput, ...] = ()
    blocks: tuple[BlockRow, ...] = ()
    #: Staged too.
    retries: tuple[NewRetry, ...] = ()
    #: Log rows of batches up to this number have been folded into blocks: delete them. None: nothing to delete.
    log_through: int | None = None
    #: Reserve ids up to this millisecond. None: unchanged.
    id_mark_ms: int | None = None


class InsertResult(enum.Enum):
    NEW = "new"
    KNOWN = "known"
    CONFLICT = "conflict"


@dataclass(frozen=True, slots=True)
class InsertOutcome:
    """`submission`: the new id, the known id, or the id in conflict."""

    result: InsertResult
    submission: int


class RetryResult(enum.Enum):
    NEW = "new"
    #: There is a retry already, unfinished or completed.
    KNOWN = "known"
    UNKNOWN = "unknown"
    NOT_FAILED = "not failed"
    #: Another submission with the same prefix or idempotency key is unfinished.
    CONFLICT = "conflict"
    #: The journal has fewer blocks of it than it had done chunks.
    INCOMPLETE = "incomplete"


@dataclass(frozen=True, slots=True)
class RetryOutcome:
    """`submission`: the new id, the known id, or the id in conflict. `state`: of one that has not failed.

    `loaded` and `blocks`, of a new one: what the engine must know, as a start would find it.
    """

    result: RetryResult
    submission: int = 0
    state: State | None = None
    loaded: LoadedSubmission | None = None
    blocks: tuple[LoadedBlock, ...] = ()


class Failure(enum.Enum):
    STORAGE_FULL = "storage full"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one batch. With a failure nothing of it is in the file. `inserts` and `retries` are in the batch's order."""

    number: int
    failure: Failure | None = None
    reason: str = ""
    inserts: tuple[InsertOutcome, ...] = ()
    retries: tuple[RetryOutcome, ...] = ()
    seconds: float = 0.0
    wal_bytes: int = 0
    checkpoint_seconds: float | None = None
    #: Bytes of the log row as stored.
    log_bytes: int = 0
    #: Times that the disk was told to keep what was written, since the last outcome.
    fsyncs: int = 0
    #: Completed submissions that the journal's own clean-up has forgotten since the last outcome, and all of them.
    forgotten_completed: int = 0
    forgotten: int = 0
    #: A checkpoint or the clean-up failed and will be tried again; says why. It concerns no batch.
    warning: str = ""


class LoadedSubmission(NamedTuple):
    """An unfinished submission (or a failed or cancelled one whose blocks are not folded yet) found at start.

    A tuple, because a start makes a million of them.
    """

    submission: int
    state: State
    chunks_total: int
    chunk_size: int
    direct: bool
    strategic_metadata: dict[str, int]


#: submission, block, batch, done, attempts, the submission's chunks
LoadedBlock: TypeAlias = tuple[int, int, int, bytes, bytes, int]


class RecoverySink(Protocol):
    """Who takes what a journal loads, in this order: submissions by id, blocks, log rows by batch number."""

    def load_submissions(self, rows: Iterable[LoadedSubmission]) -> None:
        """Raises ValueError naming the one that cannot be."""
        ...

    def load_blocks(self, rows: Iterable[LoadedBlock]) -> None:
        """Rows that make sense by themselves. Raises ValueError naming the one that does not fit what is there."""
        ...

    def events(self, events: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """What else was found at start."""

    last_batch: int
    id_mark_ms: int
    #: Completed submissions that are not forgotten yet.
    completed: int


@dataclass(slots=True)
class JournalOptions:
    """How a journal is opened; see docs/configuration.md for the settings of the same names."""

    path: str
    temporary: bool = False
    durability: str = "full"
    external_checkpoints: bool = False
    max_submission_age_s: float = 3600.0
    #: Bytes of WAL after which a checkpoint is finished between two commits.
    checkpoint_bytes: int = 16 * 1024 * 1024
    extra_pragmas: dict[str, str] = field(default_factory=dict)
    #: SQLite's own way to the file system unless named otherwise.
    vfs: str | None = None


class Journal(Protocol):
    """The narrow interface of durable storage. One thread applies batches; nothing else writes.

    Errors at open and load are StartupError (opsqueue.server.errors); apply never raises for a storage error, its
    Outcome says it.
    """

    def load(self, sink: RecoverySink) -> Loaded: ...

    def apply(self, batch: Batch) -> Outcome: ...

    def maintain(self) -> bool:
        """Forget what is old enough, one slice of at most a few milliseconds; True: there is more to do now."""
        ...

    def close(self) -> None: ...
