"""Where chunks' contents live: a local directory, this process's memory, or a bucket. Knows no submissions' states.

A directory is written by plain system calls: four times as fast as through obstore, and safe to use after a fork.
Everything else goes through obstore, whose runtime does not survive a fork: that is refused instead of hanging.
The calls block and ignore signals, so they belong on a thread of a Pool.
"""

from __future__ import annotations

import itertools
import os
import time
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from opsqueue.client.store_options import Options, StoreOptions, sorted_options, with_environment
from opsqueue.exceptions import NewObjectStoreClientError

if TYPE_CHECKING:
    from obstore.store import ObjectStore as AnyObstore

#: And what their names in the environment begin with.
_BUCKET_SCHEMES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
_KNOWN = "file:///absolute/path, memory://, s3://bucket/path, gs://bucket/path, az://container/path"


#: Seconds below which a call is made at once, and bytes below which that is thought of.
_QUICK_S = 0.0005
_QUICK_BYTES = 1024 * 1024


class StoreError(Exception):
    """An object could not be read or written; the text names it and the cause."""


class Store(Protocol):
    """Whole objects by path, below one base. Raises StoreError."""

    def put(self, path: str, data: bytes) -> None:
        """Stores an object, whole or not at all, over one that is there."""

    def get(self, path: str) -> bytes:
        """An object's bytes."""

    def is_quick(self, size: int) -> bool:
        """Whether an object of `size` bytes, 0 when it is not known, is read or written sooner than a thread starts."""


def input_path(prefix: str, index: int) -> str:
    """Where a chunk's operations stand."""
    return f"{prefix}/{index}-in.bin"


def output_path(prefix: str, index: int) -> str:
    """Where a chunk's results stand."""
    return f"{prefix}/{index}-out.bin"


def open_store(url: str, options: Options = ()) -> Store:
    """The store at `url`; no network. Raises NewObjectStoreClientError, TypeError when `options` are no pairs."""
    checked = sorted_options(options)
    if not isinstance(url, str):
        raise TypeError(f"object_store_url must be a str, not {url!r}")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise NewObjectStoreClientError(
                f"object store URL {url!r}: a file URL needs an absolute path, file:///path"
            )
        return DirectoryStore(urllib.parse.unquote(parts.path), durable=checked.durable)
    if parts.scheme == "memory":
        return BucketStore(url, _shared_memory(), parts.netloc + parts.path)
    if parts.scheme not in _BUCKET_SCHEMES:
        raise NewObjectStoreClientError(f"object store URL {url!r} is none that is known: {_KNOWN}")
    return BucketStore(url, _bucket(url, checked), "")


def _bucket(url: str, options: StoreOptions) -> AnyObstore:
    # imported late: most local programs never need it
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    try:
        return from_url(  # type: ignore[no-any-return,call-overload]  # keys are checked there
            url,
            config=options.config,
            client_options=with_environment(options.client, _BUCKET_SCHEMES[urllib.parse.urlsplit(url).scheme]),
            retry_config=options.retry or None,
        )
    except (BaseError, ValueError, TypeError, OSError) as error:
        raise NewObjectStoreClientError(f"object store {url!r} cannot be used: {first_line(error)}") from error


_memory: AnyObstore | None = None


def _shared_memory() -> AnyObstore:
    # one for the whole process, so that a producer and a consumer in it meet
    global _memory
    if _memory is None:
        from obstore.store import MemoryStore

        _memory = MemoryStore()
    return _memory


def first_line(error: BaseException) -> str:
    """An error's text as far as its first line; obstore's go on with what only its authors need."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


class DirectoryStore:
    """Objects as files below one directory, made on demand."""

    _counter = itertools.count()

    def __init__(self, root: str, *, durable: bool = False) -> None:
        self.root = root
        self._durable = durable
        self._root = Path(root)
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
        temporary = f"{target}.{os.getpid()}-{next(self._counter)}.tmp"
        try:
            try:
                file = open(temporary, "xb", buffering=0)  # noqa: SIM115  # closed below; retried once
            except FileNotFoundError:
                self._make(target.parent)
                file = open(temporary, "xb", buffering=0)  # noqa: SIM115
            try:
                with file:
                    view = memoryview(data)
                    while view:
                        view = view[file.write(view) :]
                    if self._durable:
                        os.fsync(file.fileno())
                os.replace(temporary, target)
                if self._durable:
                    _sync_directory(target.parent)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise StoreError(f"cannot write {target}: {error.strerror or error}") from error
        self._took(begun)

    def get(self, path: str) -> bytes:
        begun = time.perf_counter()
        target = self._locate(path)
        try:
            with open(target, "rb", buffering=0) as file:
                data = file.read()
        except OSError as error:
            raise StoreError(f"cannot read {target}: {error.strerror or error}") from error
        self._took(begun)
        return data

    def _make(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if self._durable:
            # the names of those that were just made stand in the ones above
            for above in (directory, *directory.parents):
                _sync_directory(above.parent)
                if above == self._root:
                    break

    def _locate(self, path: str) -> Path:
        # prefixes come from other programs by way of the server
        if any(part in ("", ".", "..") for part in path.split("/")) or "\0" in path:
            raise StoreError(f"{path!r} is no path of an object below {self._root}")
        return self._root / path


def _sync_directory(directory: Path) -> None:
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


class BucketStore:
    """Objects through obstore."""

    #: The process whose obstore runtime runs; it is one for all stores.
    _runtime_pid: int | None = None

    def __init__(self, url: str, store: AnyObstore, base: str) -> None:
        self.url = url.rstrip("/")
        self.obstore = store
        #: What every path begins with.
        self.base = base.strip("/") + "/" if base.strip("/") else ""

    def put(self, path: str, data: bytes) -> None:
        import obstore

        self._check_process()
        try:
            obstore.put(self.obstore, self.base + path, data)
        except Exception as error:
            raise StoreError(f"cannot write {self.url}/{path}: {first_line(error)}") from error

    def get(self, path: str) -> bytes:
        import obstore

        self._check_process()
        try:
            return bytes(obstore.get(self.obstore, self.base + path).bytes())
        except Exception as error:
            raise StoreError(f"cannot read {self.url}/{path}: {first_line(error)}") from error

    def is_quick(self, size: int) -> bool:
        return False

    async def put_async(self, path: str, data: bytes) -> None:
        """As `put`, under asyncio."""
        import obstore

        self._check_process()
        try:
            await obstore.put_async(self.obstore, self.base + path, data)
        except Exception as error:
            raise StoreError(f"cannot write {self.url}/{path}: {first_line(error)}") from error

    async def get_async(self, path: str) -> bytes:
        """As `get`, under asyncio."""
        import obstore

        self._check_process()
        try:
            found = await obstore.get_async(self.obstore, self.base + path)
            return bytes(await found.bytes_async())
        except Exception as error:
            raise StoreError(f"cannot read {self.url}/{path}: {first_line(error)}") from error

    def _check_process(self) -> None:
        if BucketStore._runtime_pid is None:
            BucketStore._runtime_pid = os.getpid()
        elif BucketStore._runtime_pid != os.getpid():
            raise StoreError(
                f"{self.url} was used before this process was forked, which an object store client does not survive; "
                "start processes with the multiprocessing method 'spawn' or 'forkserver', or before the first use"
            )
