"""What `opsqueue map` reads and writes: JSON lines, text lines or the files of a directory. Calls no function."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import orjson

KINDS: Final = ("json", "text", "files")
#: What the directories of runs that can be resumed begin with.
STATE_PREFIX: Final = ".opsqueue-map-"


class ItemError(Exception):
    """An item cannot be read or written; the text says which."""


#: A file's device and inode.
Identity: TypeAlias = tuple[int, int]


def identity(file: str | Path | int) -> Identity | None:
    """Which file a path or a descriptor leads to; None: to none yet."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def read(kind: str, source: str | None, leave_out: frozenset[Identity | None] = frozenset()) -> Iterator[Any]:
    """The items: of standard input, or of the file or directory `source`, without the files `leave_out`.

    Raises ItemError.
    """
    if kind == "files":
        yield from _files(Path(source or "."), leave_out)
        return
    if source is None:
        yield from _lines(kind, sys.stdin.buffer, "standard input")
        return
    try:
        with open(source, "rb") as stream:
            yield from _lines(kind, stream, source)
    except OSError as error:
        raise ItemError(f"cannot read {source}: {error.strerror or error}") from error


def _lines(kind: str, stream: BinaryIO, name: str) -> Iterator[Any]:
    for number, line in enumerate(stream, 1):
        text = line.rstrip(b"\r\n")
        try:
            # the standard library's: integers keep their value however large they are
            yield json.loads(text) if kind == "json" else text.decode()
        except json.JSONDecodeError as error:
            raise ItemError(f"{name}, line {number} is no JSON: {error}") from error
        except UnicodeDecodeError as error:
            raise ItemError(f"{name}, line {number} is not UTF-8: {error}") from error


def _files(directory: Path, leave_out: frozenset[Identity | None]) -> Iterator[str]:
    if not directory.is_dir():
        raise ItemError(f"{directory} is not a directory")
    for folder, folders, names in os.walk(directory, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not _is_ours(folder, name, leave_out))
        for name in sorted(names):
            path = os.path.join(folder, name)
            try:
                path.encode()
            except UnicodeEncodeError as error:
                raise ItemError(f"the name of {os.fsencode(path)!r} is not UTF-8; rename the file") from error
            if identity(path) not in leave_out:
                yield path


def _is_ours(folder: str, name: str, leave_out: frozenset[Identity | None]) -> bool:
    return name.startswith(STATE_PREFIX) or identity(os.path.join(folder, name)) in leave_out


def _refuse(error: OSError) -> None:
    raise ItemError(f"cannot read {error.filename}: {error.strerror or error}") from error


class Writer:
    """Results, a line each: JSON for results of JSON items and of files, text for text if the results are."""

    def __init__(self, kind: str, stream: BinaryIO) -> None:
        self._kind = kind
        self._stream = stream
        self._count = 0

    def write(self, result: Any) -> None:
        """One line. Raises ItemError for a result that is no line, and writes nothing then."""
        self._stream.write(self._line(result) + b"\n")
        self._count += 1

    def _line(self, result: Any) -> bytes:
        try:
            if self._kind == "text" and isinstance(result, str):
                if "\n" in result or "\r" in result:
                    raise ItemError(f"result {self._count + 1} has several lines; --kind json keeps them apart")
                return result.encode()
            try:
                return orjson.dumps(result, option=orjson.OPT_SERIALIZE_NUMPY)
            except TypeError:
                return json.dumps(result, ensure_ascii=False, separators=(",", ":")).encode()
        except (TypeError, ValueError) as error:
            raise ItemError(f"result {self._count + 1} cannot be written as JSON: {error}") from error
