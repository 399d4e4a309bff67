"""Databases as a reference server (channable/opsqueue 0.30.3 or 0.40) leaves them, made without one.

The tables and columns are the reference's, and how its rows come about: a chunk is in `chunks` until it is done, then
in `chunks_completed`; an end moves the submission's row to the table of its end and what waited to `chunks_failed`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import apsw

_SUBMISSION = "id BIGINT PRIMARY KEY NOT NULL, prefix TEXT, chunks_total INTEGER NOT NULL DEFAULT 0"
_CHUNK = "submission_id INTEGER NOT NULL, chunk_index INTEGER NOT NULL"
_CHUNK_KEY = "PRIMARY KEY (submission_id, chunk_index)"
_CARRIER = "otel_trace_carrier TEXT NOT NULL DEFAULT '{}', chunk_size INTEGER"

#: As migrations up to 0.30.3 leave it; indexes that the reference needs for its own queries are left out.
_SCHEMA_0_30 = f"""
CREATE TABLE _sqlx_migrations (version BIGINT PRIMARY KEY, description TEXT NOT NULL, installed_on TIMESTAMP NOT NULL,
    success BOOLEAN NOT NULL, checksum BLOB NOT NULL, execution_time BIGINT NOT NULL);
CREATE TABLE submissions ({_SUBMISSION}, chunks_done INTEGER NOT NULL DEFAULT 0, metadata BLOB, {_CARRIER});
CREATE TABLE submissions_completed ({_SUBMISSION}, metadata BLOB, completed_at DATETIME NOT NULL, {_CARRIER});
CREATE TABLE submissions_failed ({_SUBMISSION}, metadata BLOB, failed_chunk_id INTEGER NOT NULL,
    failed_at DATETIME NOT NULL, {_CARRIER});
CREATE TABLE chunks ({_CHUNK}, input_content BLOB NULL, retries INTEGER NOT NULL DEFAULT 0, {_CHUNK_KEY})
    WITHOUT ROWID, STRICT;
CREATE TABLE chunks_completed ({_CHUNK}, output_content BLOB NULL, completed_at DATETIME NOT NULL, {_CHUNK_KEY})
    WITHOUT ROWID;
CREATE TABLE chunks_failed ({_CHUNK}, input_content BLOB NULL, failure BLOB NOT NULL DEFAULT '',
    failed_at DATETIME NOT NULL, skipped BOOL NOT NULL DEFAULT false, {_CHUNK_KEY}) WITHOUT ROWID;
CREATE TABLE submissions_metadata (submission_id INTEGER NOT NULL, metadata_key TEXT NOT NULL,
    metadata_value INTEGER NOT NULL, PRIMARY KEY (submission_id, metadata_key, metadata_value)) WITHOUT ROWID, STRICT;
"""
_SCHEMA_0_40 = f"""
CREATE TABLE submissions_cancelled ({_SUBMISSION}, chunks_done INTEGER NOT NULL DEFAULT 0, metadata BLOB,
    cancelled_at DATETIME NOT NULL);
ALTER TABLE submissions_failed ADD COLUMN chunks_done INTEGER;
"""
MIGRATIONS_0_30 = (
    20240704100242, 20240704100449, 20241104104445, 20241117104740, 20241122175706, 20250104155558, 20250416081453,
)  # fmt: skip
MIGRATIONS_0_40 = (*MIGRATIONS_0_30, 20250803174028, 20260225164600, 20260429173300)


def old_id(ago_s: float = 0.0, sequence: int = 0) -> int:
    """An id as the reference makes them, of a submission inserted so many seconds ago."""
    return (round((time.time() - ago_s) * 1000) << 22) + sequence


@dataclass
class Old:
    """One submission of the old server. Either a `prefix` or `contents`."""

    id: int
    count: int
    prefix: str | None = None
    contents: Sequence[bytes] | None = None
    #: Chunks that are done, with what they gave (None: it is in the object store).
    done: Mapping[int, bytes | None] = field(default_factory=dict)
    retries: Mapping[int, int] = field(default_factory=dict)
    metadata: bytes | None = None
    strategic: Mapping[str, int] = field(default_factory=dict)
    chunk_size: int | None = 1
    carrier: str = "{}"

    def content(self, chunk: int) -> bytes | None:
        """A chunk's input; None: it is in the object store."""
        return None if self.contents is None else self.contents[chunk]


class ReferenceDatabase:
    """A reference server's file at `path`, open as the server has it; `close` it as a stopped one leaves it, or give it
    up with `abandon`, as a killed one does: with its WAL beside it."""

    def __init__(self, path: Path, migrations: Sequence[int] = MIGRATIONS_0_40) -> None:
        self.path = path
        self.connection = apsw.Connection(str(path))
        self.connection.pragma("journal_mode", "WAL")
        self.connection.wal_autocheckpoint(0)
        self.connection.execute(_SCHEMA_0_30)
        self.is_0_40 = 20260429173300 in migrations
        if self.is_0_40:
            self.connection.execute(_SCHEMA_0_40)
        for number, version in enumerate(migrations):
            self.connection.execute(
                "INSERT INTO _sqlx_migrations VALUES (?, 'x', datetime(), 1, x'00', ?)",
                (version, time.perf_counter_ns() + number),
            )

    def add(self, old: Old) -> None:
        """Insert it, with the chunks that are done done."""
        with self.connection:
            self._insert("submissions", old.id, old.prefix, old.count, old.metadata, chunks_done=len(old.done),
                         chunk_size=old.chunk_size, otel_trace_carrier=old.carrier)  # fmt: skip
            self.connection.executemany(
                "INSERT INTO submissions_metadata VALUES (?, ?, ?)",
                ((old.id, key, value) for key, value in old.strategic.items()),
            )
            self.connection.executemany(
                "INSERT INTO chunks VALUES (?, ?, ?, ?)",
                ((old.id, chunk, old.content(chunk), old.retries.get(chunk, 0)) for chunk in range(old.count)
                 if chunk not in old.done),
            )  # fmt: skip
            self.connection.executemany(
                "INSERT INTO chunks_completed VALUES (?, ?, ?, julianday('now'))",
                ((old.id, chunk, output) for chunk, output in old.done.items()),
            )

    def complete(self, old: Old) -> None:
        """Move its row to the completed ones; of the size and the carrier the reference says nothing there."""
        with self.connection:
            self._take(old)
            self._insert("submissions_completed", old.id, old.prefix, old.count, old.metadata, completed_at=_now_day())

    def fail(self, old: Old, chunk: int, failure: str) -> None:
        """End it with this chunk's failure."""
        with self.connection:
            self._take(old)
            done = {"chunks_done": len(old.done)} if self.is_0_40 else {}
            self._insert("submissions_failed", old.id, old.prefix, old.count, old.metadata, failed_at=_now_day(),
                         failed_chunk_id=chunk, **done)  # fmt: skip
            self._skip(old, chunk, failure)

    def cancel(self, old: Old) -> None:
        """Cancel it."""
        with self.connection:
            self._take(old)
            self._insert("submissions_cancelled", old.id, old.prefix, old.count, old.metadata, cancelled_at=_now_day(),
                         chunks_done=len(old.done))  # fmt: skip
            self._skip(old, -1, "")

    def forget_outputs(self) -> None:
        """What the reference does with every chunk that was done longer than --max-submission-age ago."""
        self.connection.execute("DELETE FROM chunks_completed")

    def checkpoint(self) -> None:
        """Move the WAL into the file."""
        self.connection.wal_checkpoint("main", apsw.SQLITE_CHECKPOINT_TRUNCATE)

    def close(self) -> None:
        """As a server that stopped in order leaves it: no WAL."""
        self.connection.close()

    def abandon(self, to: Path) -> Path:
        """As a killed server leaves it, in the directory `to`: the file and its WAL."""
        for name in (self.path.name, self.path.name + "-wal"):
            (to / name).write_bytes((self.path.parent / name).read_bytes())
        self.close()
        return to / self.path.name

    def _take(self, old: Old) -> None:
        self.connection.execute("DELETE FROM submissions WHERE id = ?", (old.id,))

    def _skip(self, old: Old, failed: int, failure: str) -> None:
        self.connection.execute(
            "INSERT INTO chunks_failed SELECT submission_id, chunk_index, input_content, "
            "iif(chunk_index = ?1, ?2, ''), julianday('now'), chunk_index <> ?1 FROM chunks WHERE submission_id = ?3",
            (failed, failure, old.id),
        )
        self.connection.execute("DELETE FROM chunks WHERE submission_id = ?", (old.id,))

    def _insert(
        self, table: str, submission: int, prefix: str | None, count: int, metadata: bytes | None, **more: object
    ) -> None:
        columns = {"id": submission, "prefix": prefix, "chunks_total": count, "metadata": metadata, **more}
        marks = ", ".join("?" * len(columns))
        self.connection.execute(
            f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})",
            tuple(columns.values()),  # type: ignore[arg-type]
        )


def _now_day() -> float:
    return time.time() / 86_400 + 2440587.5
