"""Chunks' contents as files below one directory, by plain system calls. Knows no submissions.

A file is written without a name and gets it when it is whole: a process that is killed leaves nothing behind. Where the
file system cannot do that, or the name is taken, it is written under a temporary name and renamed.
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from pathlib import Path
from typing import Final

from opsqueue.client.store_error import StoreError

#: Seconds below which a call is made at once, and bytes below which that is thought of.
_QUICK_S: Final = 0.0005
_QUICK_BYTES: Final = 1024 * 1024

_NO_PARTS: Final = frozenset(("", ".", ".."))
#: What open says where files cannot be without a name: the file system, the kernel.
_NEED_NAMES: Final = frozenset((errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS))
#: 0 where the system knows no files without a name.
_UNNAMED: Final = getattr(os, "O_TMPFILE", 0)


class DirectoryStore:
    """Objects as files below one directory, made on demand. Thread-safe, also between processes."""

    _counter = itertools.count()

    def __init__(self, root: str, *, durable: bool = False) -> None:
        self.root = root
        self._durable = durable
        self._start = root.rstrip("/") + "/"
        self._has_unnamed = bool(_UNNAMED)
        #: Seconds that calls take lately, by the shortest of them: others had to wait for other threads. Unknown until
        #: there was one, since the directory may be a network's.
        self._seconds = float("inf")

    def is_quick(self, size: int) -> bool:
        return self._seconds < _QUICK_S and size < _QUICK_BYTES

    def _took(self, begun: float) -> None:
        self._seconds = min(time.perf_counter() - begun, self._seconds * 1.02)

    def put(self, path: str, data: bytes) -> None:
        begun = time.perf_counter()
        target = self._locate(path)
        try:
            try:
                self._put(target, data)
            except FileNotFoundError:
                self._make(Path(target).parent)
                self._put(target, data)
        except OSError as error:
            raise StoreError(f"cannot write {target}: {error.strerror or error}") from error
        self._took(begun)

    def get(self, path: str) -> bytes:
        begun = time.perf_counter()
        target = self._locate(path)
        try:
            data = _read(target)
        except OSError as error:
            raise StoreError(f"cannot read {target}: {error.strerror or error}") from error
        self._took(begun)
        return data

    def _put(self, target: str, data: bytes) -> None:
        directory = target[: target.rindex("/")]
        if not (self._has_unnamed and self._put_unnamed(directory, target, data)):
            self._put_renamed(target, data)
        if self._durable:
            _sync_directory(directory)

    def _put_unnamed(self, directory: str, target: str, data: bytes) -> bool:
        """False: it has to be done another way."""
        try:
            file = os.open(directory, os.O_WRONLY | os.O_CLOEXEC | _UNNAMED, 0o666)
        except OSError as error:
            if error.errno not in _NEED_NAMES:
                raise
            self._has_unnamed = False
            return False
        try:
            self._write(file, data)
            try:
                # only with a directory's descriptor does Python follow the link, which is what names the open file
                os.link(f"/proc/self/fd/{file}", target, src_dir_fd=file, follow_symlinks=True)
            except FileExistsError:
                return False
            except OSError:
                # no /proc, perhaps; what else may be wrong the other way meets, too
                self._has_unnamed = False
                return False
        finally:
            os.close(file)
        return True

    def _put_renamed(self, target: str, data: bytes) -> None:
        temporary = f"{target}.{os.getpid()}-{next(self._counter)}.tmp"
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                self._write(file, data)
            finally:
                os.close(file)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _write(self, file: int, data: bytes) -> None:
        written = os.write(file, data)
        while written < len(data):
            written += os.write(file, memoryview(data)[written:])
        if self._durable:
            os.fsync(file)

    def _make(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if self._durable:
            # the names of those that were just made stand in the ones above
            root = Path(self.root)
            for above in (directory, *directory.parents):
                _sync_directory(str(above.parent))
                if above == root:
                    break

    def _locate(self, path: str) -> str:
        # prefixes come from other programs by way of the server
        if not _NO_PARTS.isdisjoint(path.split("/")) or "\0" in path:
            raise StoreError(f"{path!r} is no path of an object below {self.root}")
        return self._start + path


def _read(target: str) -> bytes:
    file = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(file).st_size
        data = os.read(file, size + 1)
        if len(data) == size:
            return data
        # cut short by the system, or longer than it was said to be
        parts = [data]
        while parts[-1]:
            parts.append(os.read(file, 1 << 20))
        return b"".join(parts)
    finally:
        os.close(file)


def _sync_directory(directory: str) -> None:
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
