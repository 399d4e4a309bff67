"""Where chunks' contents live: a local directory, this process's memory, or a bucket. Knows no submissions' states.

A directory is written by plain system calls: four times as fast as through obstore, and safe to use after a fork.
Everything else goes through obstore, whose runtime does not survive a fork: that is refused instead of hanging.
The calls block and ignore signals, so they belong on a thread of a Pool.
"""

from __future__ import annotations

import os
import urllib.parse
from typing import TYPE_CHECKING, Protocol

from opsqueue.client.directory_store import DirectoryStore
from opsqueue.client.store_error import StoreError
from opsqueue.client.store_options import Options, StoreOptions, sorted_options, with_environment
from opsqueue.exceptions import NewObjectStoreClientError

if TYPE_CHECKING:
    from obstore.store import ObjectStore as AnyObstore

#: And what their names in the environment begin with.
_BUCKET_SCHEMES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
_KNOWN = "file:///absolute/path, memory://, s3://bucket/path, gs://bucket/path, az://container/path"


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
