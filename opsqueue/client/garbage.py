"""Removes from an object store what belongs to submissions that the server has forgotten, and only that.

A prefix is garbage when it is a UUIDv7 older than asked, nothing under it is newer, and the server knows no submission
of that prefix. Whatever cannot be told, because of the store or of the server, is left as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from enum import Enum

import msgspec

from opsqueue.client.store_error import StoreError
from opsqueue.client.store_objects import ChunkObjects, StoredObject, StoreObjects, made_s
from opsqueue.exceptions import InternalProducerClientError


class Verdict(Enum):
    """What was found of one prefix."""

    YOUNG = "something under it is too young"
    KNOWN = "the server knows its submission"
    FOREIGN = "nothing under it is a chunk's"
    REMOVED = "removed"
    FAILED = "an error; what is left stays"


class Looked(msgspec.Struct, frozen=True):
    """About one prefix; `reason`: why it failed.

    `objects` and `size`, in bytes, are of chunks: what was removed, or would be; of a failed prefix what was removed
    until then; of a known one what is there. A young one's are not counted.
    """

    prefix: str
    verdict: Verdict
    objects: int = 0
    size: int = 0
    reason: str = ""


class ServerGoneError(Exception):
    """The server does not answer any more: nothing else can be judged."""


def collect(
    objects: StoreObjects,
    is_known: Callable[[str], bool],
    *,
    older_than_s: float,
    dry_run: bool,
) -> Iterator[Looked]:
    """Judges every prefix and removes garbage, unless it is a dry run; gives what it found, one by one.

    `is_known(prefix)`: whether the server knows a submission of that prefix. Raises StoreError when the prefixes cannot
    be listed, ServerGoneError when the server cannot be asked.
    """
    before_s = time.time() - older_than_s
    last = None
    for prefix in objects.prefixes():
        if prefix != last:
            last = prefix
            yield _look(objects, is_known, prefix, before_s, dry_run=dry_run)


def _look(
    objects: StoreObjects, is_known: Callable[[str], bool], prefix: str, before_s: float, *, dry_run: bool
) -> Looked:
    made = made_s(prefix)
    if made is None or made >= before_s:
        return Looked(prefix, Verdict.YOUNG)
    count = size = others = removed = removed_size = 0
    try:
        for found in objects.under(prefix):
            if found.modified_s >= before_s:
                return Looked(prefix, Verdict.YOUNG)
            if found.is_of_a_chunk:
                count += 1
                size += found.size
            else:
                others += 1
        if others and not count:
            return Looked(prefix, Verdict.FOREIGN)
        # after the listing: whatever was inserted before it is known now
        if is_known(prefix):
            return Looked(prefix, Verdict.KNOWN, count, size)
        if dry_run:
            return Looked(prefix, Verdict.REMOVED, count, size)
        # without any, it is a directory that was emptied before: it goes, too
        for found in objects.remove(prefix, _old(objects, prefix, before_s)):
            removed += 1
            removed_size += found.size
    except StoreError as error:
        return Looked(prefix, Verdict.FAILED, removed, removed_size, str(error))
    except (InternalProducerClientError, TimeoutError) as error:
        raise ServerGoneError(str(error)) from error
    return Looked(prefix, Verdict.REMOVED, removed, removed_size)


def _old(objects: StoreObjects, prefix: str, before_s: float) -> Iterable[StoredObject]:
    """What is a chunk's under the prefix, as it is now. Raises StoreError, before anything is removed."""
    of_chunks = ChunkObjects()
    for found in objects.under(prefix):
        if found.modified_s >= before_s:
            raise StoreError(f"{prefix}/{found.name} was written while the server was asked")
        of_chunks.add(found)
    return of_chunks
