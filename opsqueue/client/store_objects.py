"""What stands in an object store under which prefix, and removing it. Memory: 24 bytes for an object of one prefix."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from opsqueue.client.directory_store import DirectoryStore
from opsqueue.client.store import BucketStore, Store, first_line
from opsqueue.client.store_error import StoreError

if TYPE_CHECKING:
    from obstore.store import ObjectStore as AnyObstore

#: A UUIDv7 as text (RFC 9562), as the client libraries write it.
_PREFIX: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
#: A chunk's operations or results.
_NAME: Final = re.compile(r"(0|[1-9][0-9]*)-(in|out)\.bin")
#: What a process that was killed while it wrote a file leaves.
_UNFINISHED: Final = re.compile(r"(0|[1-9][0-9]*)-(in|out)\.bin\.[0-9]+-[0-9]+\.tmp")
#: More chunks than any submission has.
_NUMBERS: Final = 1 << 63
#: Objects that one request asks for or removes.
_AT_ONCE: Final = 1_000


class StoredObject(msgspec.Struct, frozen=True):
    """`name`: below its prefix. `size` in bytes, `modified_s` in seconds since the Unix epoch."""

    name: str
    size: int
    modified_s: float

    @property
    def is_of_a_chunk(self) -> bool:
        """A chunk's operations or results, or the rest of a write that was cut off."""
        return _NAME.fullmatch(self.name) is not None or _UNFINISHED.fullmatch(self.name) is not None


class ChunkObjects:
    """Those objects of one prefix that are a chunk's, in little memory: a submission may have millions."""

    def __init__(self) -> None:
        self._numbers = array("Q")
        self._sizes = array("Q")
        self._times = array("d")
        #: Unfinished ones, and those of a number that no submission reaches.
        self._others: list[StoredObject] = []

    def add(self, found: StoredObject) -> None:
        """Remembers it, unless it is none of a chunk's."""
        if (named := _NAME.fullmatch(found.name)) and (number := int(named[1])) < _NUMBERS:
            self._numbers.append(2 * number + (named[2] == "out"))
            self._sizes.append(found.size)
            self._times.append(found.modified_s)
        elif found.is_of_a_chunk:
            self._others.append(found)

    def __iter__(self) -> Iterator[StoredObject]:
        for number, size, modified_s in zip(self._numbers, self._sizes, self._times, strict=True):
            yield StoredObject(f"{number // 2}-{'out' if number % 2 else 'in'}.bin", size, modified_s)
        yield from self._others


def made_s(prefix: str) -> float | None:
    """When a UUIDv7 was made, in seconds since the Unix epoch; None: `prefix` is none."""
    return int(prefix[:8] + prefix[9:13], 16) / 1000 if _PREFIX.fullmatch(prefix) else None


class StoreObjects(Protocol):
    """The objects of one store, by prefix. Raises StoreError."""

    def prefixes(self) -> Iterator[str]:
        """UUIDv7s under which something stands, or an empty directory; one may come more than once."""

    def under(self, prefix: str) -> Iterator[StoredObject]:
        """Everything under one prefix."""

    def remove(self, prefix: str, objects: Iterable[StoredObject]) -> Iterator[StoredObject]:
        """Removes these objects, and the prefix's directory when nothing else is in it; gives each that is gone."""


def objects_of(store: Store) -> StoreObjects:
    """The objects of a store that `open_store` opened."""
    if isinstance(store, DirectoryStore):
        return _Directory(store.root)
    if isinstance(store, BucketStore):
        return _Bucket(store)
    raise TypeError(f"{type(store).__name__} cannot list its objects")


class _Directory:
    def __init__(self, root: str) -> None:
        self._root = root

    def prefixes(self) -> Iterator[str]:
        try:
            with os.scandir(self._root) as entries:
                for entry in entries:
                    if made_s(entry.name) is not None and entry.is_dir(follow_symlinks=False):
                        yield entry.name
        except OSError as error:
            raise StoreError(f"cannot list {self._root}: {error.strerror or error}") from error

    def under(self, prefix: str) -> Iterator[StoredObject]:
        directory = os.path.join(self._root, prefix)
        try:
            yield from _files(directory, "")
        except OSError as error:
            raise StoreError(f"cannot list {error.filename or directory}: {error.strerror or error}") from error

    def remove(self, prefix: str, objects: Iterable[StoredObject]) -> Iterator[StoredObject]:
        directory = os.path.join(self._root, prefix)
        try:
            for found in objects:
                os.unlink(os.path.join(directory, found.name))
                yield found
            with os.scandir(directory) as entries:
                empty = next(entries, None) is None
            if empty:
                os.rmdir(directory)
        except OSError as error:
            raise StoreError(f"cannot remove what is in {directory}: {error.strerror or error}") from error


def _files(directory: str, below: str) -> Iterator[StoredObject]:
    with os.scandir(directory) as entries:
        for entry in entries:
            name = below + entry.name
            if entry.is_dir(follow_symlinks=False):
                # of no age, but it keeps what is above it from being empty
                yield StoredObject(f"{name}/", 0, 0.0)
                yield from _files(entry.path, f"{name}/")
                continue
            about = entry.stat(follow_symlinks=False)
            # a link or a socket is none of a client's: only its age counts
            is_file = entry.is_file(follow_symlinks=False)
            yield StoredObject(name if is_file else f"{name}/", about.st_size, about.st_mtime)


class _Bucket:
    def __init__(self, store: BucketStore) -> None:
        self._bucket = store
        self._store: AnyObstore = store.obstore
        self._base = store.base

    def prefixes(self) -> Iterator[str]:
        last = None
        for path, _, _ in self._list(self._base):
            prefix = path.removeprefix(self._base).partition("/")[0]
            if prefix == last:
                continue
            last = prefix
            if made_s(prefix) is not None:
                yield prefix

    def under(self, prefix: str) -> Iterator[StoredObject]:
        within = f"{self._base}{prefix}/"
        for path, size, modified_s in self._list(within):
            yield StoredObject(path.removeprefix(within), size, modified_s)

    def remove(self, prefix: str, objects: Iterable[StoredObject]) -> Iterator[StoredObject]:
        import obstore

        remaining = iter(objects)
        while batch := list(islice(remaining, _AT_ONCE)):
            try:
                obstore.delete(self._store, [f"{self._base}{prefix}/{found.name}" for found in batch])
            except Exception as error:
                raise StoreError(f"cannot remove {self._bucket.url}/{prefix}: {first_line(error)}") from error
            yield from batch

    def _list(self, within: str) -> Iterator[tuple[str, int, float]]:
        import obstore

        try:
            for batch in obstore.list(self._store, within or None, chunk_size=_AT_ONCE):
                for found in batch:
                    yield found["path"], found["size"], found["last_modified"].timestamp()
        except Exception as error:
            raise StoreError(f"cannot list {self._bucket.url}: {first_line(error)}") from error
