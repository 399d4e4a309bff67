"""A stopped reference server's database as a file: what it is, whether somebody has it open, reading it with its WAL.

The file, and what lies beside it, stays byte for byte as it is: it is opened for reading, its WAL is read with SQLite's
index of it in memory (so no -shm is made), and closing runs no checkpoint. No lock is taken: locks are only looked at.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import struct
from pathlib import Path

import apsw

from opsqueue.server.importing.errors import (
    DamagedReferenceError,
    NewerReferenceError,
    NoReferenceDatabaseError,
    OlderReferenceError,
    ReferenceAccessError,
    ReferenceChangedError,
    ReferenceInUseError,
)
from opsqueue.server.sql import queries
from opsqueue.server.writer.database_file import APPLICATION_ID

#: Migrations of 0.30.3, the oldest that is understood.
NEEDED_MIGRATIONS = (
    20240704100242, 20240704100449, 20241104104445, 20241117104740, 20241122175706, 20250104155558, 20250416081453,
)  # fmt: skip
#: Later ones that leave what is read here as it was: orders, cancelled submissions, how many chunks of a failed
#: submission were done, an unused table that goes, one value for each strategic key, an index.
KNOWN_MIGRATIONS = frozenset(NEEDED_MIGRATIONS) | {
    20250803174028, 20260225164600, 20260429173300, 20260710113337, 20260717143000, 20260721133844, 20260803133844,
}  # fmt: skip

_TABLES = {"submissions", "submissions_completed", "submissions_failed", "submissions_metadata", "chunks",
           "chunks_completed", "chunks_failed", "_sqlx_migrations"}  # fmt: skip
_SQL = queries("importing")
_MAGIC = b"SQLite format 3\0"
_HEADER_BYTES = 100

#: Where SQLite keeps its locks: 512 bytes of the database, and nine of the -shm file.
_DATABASE_LOCKS = (0x40000000, 512)
_SHM_LOCKS = (120, 9)
#: struct flock: type, whence, start, length, pid.
_FLOCK = struct.Struct("@hhqqi4x")


class ReferenceFile:
    """A reference server's database, checked and opened for reading; close it. Raises a StartupError."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._seen = self._state()
        self._check_header()
        self._check_not_in_use()
        self.connection = self._open()
        try:
            self.tables = self._check_tables()
            self.origin = self._check_migrations()
        except apsw.Error as error:
            self.close()
            raise self.damaged(str(error)) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close it without a checkpoint."""
        self.connection.close(True)

    def damaged(self, what: str) -> DamagedReferenceError:
        """The error that says so."""
        return DamagedReferenceError(path=self.path, what=what)

    def check_unchanged(self) -> None:
        """Raises ReferenceInUseError or ReferenceChangedError if a server was started on it since it was opened."""
        self._check_not_in_use()
        if self._state() != self._seen:
            raise ReferenceChangedError(path=self.path)

    def _state(self) -> tuple[tuple[int, ...] | None, ...]:
        return _identity(self.path), _identity(self.path + "-wal")

    def _check_header(self) -> None:
        try:
            status = os.stat(self.path)
            if not stat.S_ISREG(status.st_mode):
                raise NoReferenceDatabaseError(path=self.path, what="it is not a regular file")
            with open(self.path, "rb", buffering=0) as file:
                header = file.read(_HEADER_BYTES) or b""
        except OSError as error:
            raise ReferenceAccessError(path=self.path, reason=error.strerror) from error
        if not header or not header.startswith(_MAGIC[: len(header)]):
            raise NoReferenceDatabaseError(path=self.path, what="it is not an SQLite file" if header else "it is empty")
        if len(header) < _HEADER_BYTES:
            raise self.damaged(f"it ends after {len(header)} bytes")
        (application_id,) = struct.unpack_from(">I", header, 68)
        if application_id == APPLICATION_ID:
            raise NoReferenceDatabaseError(path=self.path, what="it is a database of this opsqueue already")
        (page_size,) = struct.unpack_from(">H", header, 16)
        (pages,) = struct.unpack_from(">I", header, 28)
        whole = pages * (65_536 if page_size == 1 else page_size)
        if status.st_size < whole and not _size(self.path + "-wal"):
            raise self.damaged(f"it is cut off after {status.st_size} of {whole} bytes")
        if _size(self.path + "-journal"):
            raise self.damaged(f"{self.path}-journal holds a transaction that was not finished")

    def _check_not_in_use(self) -> None:
        places = ((self.path, _DATABASE_LOCKS), (self.path + "-shm", _SHM_LOCKS))
        for path, (start, length) in places:
            try:
                holder = _lock_holder(path, start, length)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise ReferenceAccessError(path=path, reason=error.strerror) from error
            if holder is not None:
                raise ReferenceInUseError(path=self.path, pid=holder)

    def _open(self) -> apsw.Connection:
        uri = f"{Path(self.path).absolute().as_uri()}?mode=ro"
        with_wal = bool(_size(self.path + "-wal"))
        if not with_wal:
            uri += "&immutable=1"
        flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
        try:
            connection = apsw.Connection(uri, flags=flags, vfs="unix-none" if with_wal else None)
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            # before the first read: then the WAL's index is in this process's memory
            connection.pragma("locking_mode", "EXCLUSIVE")
        except apsw.Error as error:
            raise ReferenceAccessError(path=self.path, reason=str(error)) from error
        return connection

    def _check_tables(self) -> frozenset[str]:
        tables = frozenset(name for (name,) in self.connection.execute(_SQL["tables"]))
        if not tables >= {"submissions", "chunks", "_sqlx_migrations"}:
            raise NoReferenceDatabaseError(path=self.path, what="an SQLite file with other tables")
        return tables

    def _check_migrations(self) -> int:
        """A number that tells this database from every other reference database, and never changes."""
        rows = list(self.connection.execute(_SQL["applied_migrations"]))
        applied = {version for version, *_ in rows}
        for version in sorted(applied - KNOWN_MIGRATIONS):
            raise NewerReferenceError(path=self.path, found=version)
        for version in NEEDED_MIGRATIONS:
            if version not in applied:
                raise OlderReferenceError(path=self.path, missing=version)
        for version, success, *_ in rows:
            if not success:
                raise self.damaged(f"migration {version} was not finished")
        for table in sorted(_TABLES - self.tables):
            raise self.damaged(f"it has no table {table}")
        first = next(row for row in rows if row[0] == NEEDED_MIGRATIONS[0])
        digest = hashlib.blake2b(repr(first).encode(), digest_size=8).digest()
        return int.from_bytes(digest) >> 1


def _identity(path: str) -> tuple[int, ...] | None:
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return None


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _lock_holder(path: str, start: int, length: int) -> int | None:
    """The process that holds a lock on these bytes; asks only. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    finally:
        os.close(fd)
    return None if kind == fcntl.F_UNLCK else pid
