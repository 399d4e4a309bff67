"""Where the database is: a path, or a private directory on tmpfs for one in memory. Never opens the database."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

from opsqueue.server.errors import StartupError

_MEMORY_ROOT: Final = Path("/dev/shm")
_MEMORY_PREFIX: Final = "opsqueue-memory-"
_FILE_NAME: Final = "opsqueue.db"


@dataclass(frozen=True)
class DatabaseLocation:
    """The database's path, and the directory to remove at the end if it is temporary."""

    path: str
    temporary_directory: Path | None = None

    @property
    def is_temporary(self) -> bool:
        return self.temporary_directory is not None

    def remove(self) -> None:
        """Remove a temporary database; a lasting one stays."""
        if self.temporary_directory is not None:
            shutil.rmtree(self.temporary_directory, ignore_errors=True)


def locate(filename: str) -> DatabaseLocation:
    """The place that `--database-filename` names: a path, `:memory:`, or an SQLite URI. Raises StartupError."""
    path = _path_of_uri(filename) if filename.startswith("file:") else filename
    if path != ":memory:":
        return DatabaseLocation(os.path.abspath(path))
    remove_abandoned()
    root = _MEMORY_ROOT if os.access(_MEMORY_ROOT, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    directory = Path(tempfile.mkdtemp(prefix=_MEMORY_PREFIX, dir=root))
    return DatabaseLocation(str(directory / _FILE_NAME), directory)


def _path_of_uri(uri: str) -> str:
    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    mode = options.pop("mode", "rwc")
    options.pop("cache", None)
    path = unquote(parts.path)
    if mode == "memory" or path in (":memory:", ""):
        return ":memory:"
    if options or mode not in ("rw", "rwc") or parts.netloc not in ("", "localhost"):
        raise StartupError(reason=f"--database-filename {uri}: only file:PATH, mode=memory and cache= are understood")
    return path


def remove_abandoned(root: Path = _MEMORY_ROOT) -> None:
    """Remove databases in memory whose server was killed before it could: those whose lock nobody holds any more."""
    for directory in root.glob(_MEMORY_PREFIX + "*"):
        # No lock file: a server that is just starting. Somebody else's, or gone meanwhile: not ours to remove.
        with contextlib.suppress(OSError):
            if directory.stat().st_uid == os.getuid() and _is_unlocked(directory / f"{_FILE_NAME}-lock"):
                shutil.rmtree(directory, ignore_errors=True)


def _is_unlocked(lock: Path) -> bool:
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
