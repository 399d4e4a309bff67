"""Batches to apply to a journal, and a sink that keeps what a journal loads."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from opsqueue.server.requests import Insert
from opsqueue.server.writer.batch import (
    Batch,
    BlockRow,
    EndedSubmission,
    InsertOutcome,
    Journal,
    LoadedBlock,
    LoadedSubmission,
    NewSubmission,
    State,
)
from opsqueue.server.writer.log_rows import EventKind, LogEvent, decode_events, encode_events

SECOND_US = 1_000_000


def now_us() -> int:
    return time.time_ns() // 1000


def new_submission(
    submission: int,
    *,
    prefix: str | None = None,
    key: str | None = None,
    count: int = 10,
    contents: Sequence[bytes] | None = None,
    fingerprint: bytes = b"same",
    metadata: bytes | None = None,
    strategic: dict[str, int] | None = None,
    paused: bool = False,
    at_us: int | None = None,
    carrier: str = "{}",
    chunk_size: int = 1,
) -> NewSubmission:
    """An insert: direct with `contents`, otherwise of `count` chunks under `prefix`."""
    return NewSubmission(
        submission,
        Insert(
            prefix=None if contents is not None else prefix or f"prefix-{submission}",
            count=count if contents is None else len(contents),
            contents=None if contents is None else list(contents),
            idempotency_key=key,
            fingerprint=fingerprint.ljust(16, b"\0"),
            chunk_size=chunk_size,
            metadata=metadata,
            strategic_metadata=strategic or {},
            otel_trace_carrier=carrier,
            paused=paused,
        ),
        now_us() if at_us is None else at_us,
    )


def ended(
    submission: int, state: State, *, ago_s: float = 0, chunks_done: int = 0, chunk: int | None = None, text: str = "no"
) -> EndedSubmission:
    """An end `ago_s` seconds ago; of a failed submission, with the chunk that failed it."""
    failed = state is State.FAILED
    return EndedSubmission(
        submission,
        state,
        chunks_done,
        now_us() - int(ago_s * SECOND_US),
        (chunk or 0) if failed else None,
        text if failed else None,
    )


def completions(submission: int, *chunks: int) -> bytes:
    return encode_events(LogEvent(EventKind.COMPLETION, submission, chunk) for chunk in chunks)


def retries(submission: int, *chunks: int) -> bytes:
    return encode_events(LogEvent(EventKind.RETRY, submission, chunk) for chunk in chunks)


def insert_one(journal: Journal, number: int, new: NewSubmission) -> InsertOutcome:
    """The outcome of a batch of one insert, which must succeed."""
    outcome = journal.apply(Batch(number, inserts=(new,)))
    assert outcome.failure is None, outcome.reason
    return outcome.inserts[0]


@dataclass
class Collected:
    """A recovery sink: everything as it came."""

    submissions: list[LoadedSubmission] = field(default_factory=list)
    blocks: list[BlockRow] = field(default_factory=list)
    log: list[LogEvent] = field(default_factory=list)
    rows: list[bytes] = field(default_factory=list)
    #: What was called, in order.
    order: list[str] = field(default_factory=list)

    def load_submissions(self, rows: Iterable[LoadedSubmission]) -> None:
        for loaded in rows:
            self.order.append("submission")
            self.submissions.append(loaded)

    def load_blocks(self, rows: Iterable[LoadedBlock]) -> None:
        for submission, block, _, done, attempts, _ in rows:
            self.order.append("block")
            self.blocks.append(BlockRow(submission, block, done, attempts))

    def events(self, events: bytes) -> None:
        self.order.append("events")
        self.rows.append(events)
        self.log.extend(decode_events(events))

    @property
    def states(self) -> dict[int, State]:
        return {loaded.submission: loaded.state for loaded in self.submissions}

    def done(self) -> set[tuple[int, int]]:
        """(submission, chunk) of all chunks that blocks or log say are done."""
        chunks_total = {loaded.submission: loaded.chunks_total for loaded in self.submissions}
        found = {(event.submission, event.chunk) for event in self.log if event.kind is EventKind.COMPLETION}
        for row in self.blocks:
            begin = row.block * 4096
            chunks = min(4096, chunks_total[row.submission] - begin)
            found |= {
                (row.submission, begin + i) for i in range(chunks) if not row.done or row.done[i // 8] >> (i % 8) & 1
            }
        return found
