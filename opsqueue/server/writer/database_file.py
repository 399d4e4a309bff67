"""The database as a file: its lock, its header, its creation, and the one writing connection. Knows no submission.

The header is read before SQLite opens the file, so that a file that is not ours stays byte for byte as it is and gets
no -wal or -shm beside it. The lock is a file of its own: closing any descriptor of the database would drop SQLite's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from pathlib import Path

import apsw

from opsqueue.server.errors import (
    DamagedDatabaseError,
    DatabaseAccessError,
    DatabaseInUseError,
    ForeignDatabaseError,
    NewerDatabaseError,
    ReferenceDatabaseError,
    StartupError,
)
from opsqueue.server.sql import migrations
from opsqueue.server.writer.batch import JournalOptions
from opsqueue.server.writer.migrations import migrate

#: "OPSQ", at offset 68 of the file.
APPLICATION_ID = 0x4F505351
#: Below it a checkpoint can corrupt the WAL of a file with several connections.
OLDEST_SQLITE = (3, 51, 3)
PAGE_SIZE = 4096
#: How long a statement waits for another process's lock.
BUSY_TIMEOUT_MS = 5_000
#: Pages that the writing connection keeps, in KiB.
CACHE_KIB = 32 * 1024

_SYNCHRONOUS = {"full": "FULL", "normal": "NORMAL"}
_SQLITE_MAGIC = b"SQLite format 3\0"
_HEADER_BYTES = 100
#: Tables that the reference's file always has.
_REFERENCE_TABLES = {"submissions", "chunks", "_sqlx_migrations"}


class OldSqliteError(StartupError):
    """SQLite {found} is too old: those before {oldest} can damage a database under load; upgrade the package apsw."""


def check_sqlite_version(version: str = "") -> None:
    """Raises OldSqliteError. `version` is for tests; by default the SQLite in use."""
    found = version or apsw.sqlite_lib_version()
    if tuple(int(part) for part in found.split(".")[:3]) < OLDEST_SQLITE:
        raise OldSqliteError(found=found, oldest=".".join(map(str, OLDEST_SQLITE)))


# --- the lock ---


def lock_path(path: str) -> str:
    """The lock file of a database; the same for every name of it."""
    return os.path.realpath(path) + "-lock"


def acquire_lock(path: str) -> int:
    """Lock the database at `path` for this process and those that inherit the descriptor; gone with the last of them.

    Raises DatabaseInUseError with the holder's pid, DatabaseAccessError when the lock file cannot be made.
    """
    try:
        fd = os.open(lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise DatabaseAccessError(path=path, reason=f"{lock_path(path)}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    except BlockingIOError as error:
        holder = os.pread(fd, 32, 0).strip()
        os.close(fd)
        raise DatabaseInUseError(pid=holder.decode() if holder.isdigit() else "unknown", path=path) from error
    except OSError as error:
        os.close(fd)
        raise DatabaseAccessError(path=path, reason=f"{lock_path(path)}: {error.strerror}") from error
    return fd


# --- before SQLite ---


def exists(path: str) -> bool:
    """Whether `path` is an opsqueue database that this version can open; False: absent or empty.

    Reads only. Raises ForeignDatabaseError, ReferenceDatabaseError, NewerDatabaseError, DamagedDatabaseError or
    DatabaseAccessError. Not while this process has the file open (see above).
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ForeignDatabaseError(path=path, what="it is not a regular file")
        if status.st_size == 0:
            return False
        header = _read_header(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DatabaseAccessError(path=path, reason=error.strerror) from error
    if not header.startswith(_SQLITE_MAGIC[: len(header)]):
        raise ForeignDatabaseError(path=path, what="it is not an SQLite file")
    if len(header) < _HEADER_BYTES:
        raise DamagedDatabaseError(path=path, what=f"it ends after {len(header)} bytes")
    _check_header(path, header, status.st_size)
    return True


def _read_header(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read(_HEADER_BYTES) or b""


def _check_header(path: str, header: bytes, size: int) -> None:
    (application_id,) = struct.unpack_from(">I", header, 68)
    if application_id == 0 and _tables(path) >= _REFERENCE_TABLES:
        raise ReferenceDatabaseError(path=path)
    if application_id != APPLICATION_ID:
        raise ForeignDatabaseError(path=path, what=f"an SQLite file with application_id {application_id:#x}")
    (version,) = struct.unpack_from(">I", header, 60)
    _check_version(path, version)
    (page_size,) = struct.unpack_from(">H", header, 16)
    (pages,) = struct.unpack_from(">I", header, 28)
    whole = pages * (65_536 if page_size == 1 else page_size)
    if size < whole and not _has_wal(path):
        raise DamagedDatabaseError(path=path, what=f"it is cut off after {size} of {whole} bytes")


def _check_version(path: str, found: int) -> None:
    known = len(migrations())
    if found > known:
        raise NewerDatabaseError(path=path, found=found, known=known)


def _has_wal(path: str) -> bool:
    """A file that a checkpoint was writing when the machine stopped may be short: its WAL has the rest."""
    try:
        return os.stat(path + "-wal").st_size > 0
    except FileNotFoundError:
        return False


def _tables(path: str) -> set[str]:
    """Names of the tables; none when SQLite cannot read them. Immutable: nothing beside the file is made or read."""
    uri = f"{Path(path).absolute().as_uri()}?mode=ro&immutable=1"
    with contextlib.closing(apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)) as connection:
        try:
            return {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        except apsw.Error:
            return set()


# --- opening ---


def open_for_writing(options: JournalOptions) -> apsw.Connection:
    """The writing connection, migrated; creates the file if need be. Raises a StartupError."""
    check_sqlite_version()
    path = os.path.realpath(options.path)
    if not exists(path):
        _create(path)
    try:
        connection = _connect(path, options.vfs)
    except apsw.Error as error:
        raise startup_error(path, error) from error
    try:
        if connection.readonly("main"):
            raise DatabaseAccessError(path=path, reason="the file is read-only")
        _check_version(path, connection.pragma("user_version"))
        _configure(connection, options)
        if migrate(connection) and not options.external_checkpoints:
            connection.wal_checkpoint("main", apsw.SQLITE_CHECKPOINT_PASSIVE)  # an older opsqueue reads the header only
    except apsw.Error as error:
        connection.close(True)
        raise startup_error(path, error) from error
    except StartupError:
        connection.close(True)
        raise
    return connection


def _create(path: str) -> None:
    """Make an empty database under another name and rename it: the file appears whole or not at all."""
    new = path + "-new"
    try:
        for leftover in (new, new + "-journal"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(leftover)
        with contextlib.closing(apsw.Connection(new)) as connection:
            connection.pragma("page_size", PAGE_SIZE)
            connection.pragma("auto_vacuum", "INCREMENTAL")
            connection.pragma("application_id", APPLICATION_ID)
            migrate(connection)
            connection.pragma("journal_mode", "WAL")
        with contextlib.suppress(FileNotFoundError):
            os.chmod(new, stat.S_IMODE(os.stat(path).st_mode))
        _sync(new)
        os.rename(new, path)
        _sync(os.path.dirname(path))
    except apsw.Error as error:
        raise startup_error(path, error) from error
    except OSError as error:
        raise DatabaseAccessError(path=path, reason=error.strerror) from error


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _connect(path: str, vfs: str | None) -> apsw.Connection:
    connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READWRITE, vfs=vfs)
    # Closing runs a checkpoint only where the journal asks for one.
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    # Otherwise SQLite plans a statement with a range anew for every value: 27 us for a delete instead of 6.
    connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
    connection.set_busy_timeout(BUSY_TIMEOUT_MS)
    return connection


def _configure(connection: apsw.Connection, options: JournalOptions) -> None:
    connection.pragma("journal_mode", "WAL")
    connection.pragma("synchronous", "OFF" if options.temporary else _SYNCHRONOUS[options.durability])
    connection.pragma("cache_size", -CACHE_KIB)
    connection.pragma("temp_store", "MEMORY")
    connection.wal_autocheckpoint(0)
    # A WAL that a long reader has let grow shrinks to this when it starts again.
    connection.pragma("journal_size_limit", 2 * options.checkpoint_bytes)
    for name, value in options.extra_pragmas.items():
        connection.pragma(name, value)


def startup_error(path: str, error: apsw.Error) -> StartupError:
    """What an SQLite error at start means for whoever starts the server."""
    if isinstance(error, apsw.CorruptError | apsw.NotADBError | apsw.SQLError | apsw.FormatError):
        return DamagedDatabaseError(path=path, what=str(error))
    if isinstance(error, apsw.BusyError | apsw.LockedError | apsw.ProtocolError):
        reason = f"another program has locked it for {BUSY_TIMEOUT_MS // 1000} seconds"
    elif isinstance(error, apsw.ReadOnlyError):
        reason = "it is read-only"
    elif isinstance(error, apsw.FullError):
        reason = os.strerror(errno.ENOSPC)
    else:
        reason = str(error)
    return DatabaseAccessError(path=path, reason=reason)
