"""What `opsqueue map` reads and writes: JSON lines, text lines or the files of a directory. Calls no function."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson

KINDS: Final = ("json", "text", "files")


class ItemError(Exception):
    """An item cannot be read or written; the text says which."""


def read(kind: str, source: str | None) -> Iterator[Any]:
    """The items: of standard input, or of the file or directory `source`. Raises ItemError."""
    if kind == "files":
        yield from _files(Path(source or "."))
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
            yield orjson.loads(text) if kind == "json" else text.decode()
        except orjson.JSONDecodeError as error:
            raise ItemError(f"{name}, line {number} is no JSON: {error}") from error
        except UnicodeDecodeError as error:
            raise ItemError(f"{name}, line {number} is not UTF-8: {error}") from error


def _files(directory: Path) -> Iterator[str]:
    if not directory.is_dir():
        raise ItemError(f"{directory} is not a directory")
    for folder, folders, names in os.walk(directory):
        folders.sort()
        for name in sorted(names):
            yield os.path.join(folder, name)


class Writer:
    """Results, a line each: JSON for results of JSON items and of files, text for text if the results are."""

    def __init__(self, kind: str, stream: BinaryIO) -> None:
        self._kind = kind
        self._stream = stream
        self._count = 0

    def write(self, result: Any) -> None:
        """One line. Raises ItemError for a result that is no JSON."""
        self._count += 1
        if self._kind == "text" and isinstance(result, str):
            self._stream.write(result.encode() + b"\n")
            return
        try:
            self._stream.write(orjson.dumps(result, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))
        except TypeError as error:
            raise ItemError(f"result {self._count} cannot be written as JSON: {error}") from error
