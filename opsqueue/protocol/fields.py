"""CBOR items read as what they must be, with errors that say what is wrong; knows no message."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn, TypeVar, cast

import cbor2

from opsqueue.protocol.errors import MessageError

U63_MAX: Final = 2**63 - 1
U64_MAX: Final = 2**64 - 1
#: Containers in containers: a strategy needs 2 for each PreferDistinct, everything else fewer than 10.
_MAX_DEPTH: Final = 100


def _refuse_tag(*_args: object) -> NoReturn:
    raise ValueError("a CBOR tag, which no message has")


#: Tags that cbor2 would turn into values of its own; the others go to the tag hook.
_KNOWN_TAGS = (0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 100, 256, 258, 260, 261, 1004, 43000, 55799)
_NO_TAGS: dict[int, Callable[..., Any]] = dict.fromkeys(_KNOWN_TAGS, _refuse_tag)


def read_cbor(data: bytes) -> object:
    """The one item of a frame."""
    source = io.BytesIO(data)
    decoder = cbor2.CBORDecoder(
        source,
        tag_hook=_refuse_tag,
        semantic_decoders=_NO_TAGS,
        max_depth=_MAX_DEPTH,
        allow_duplicate_keys=False,
        strict_hashable_types=True,
    )
    try:
        value: object = decoder.decode()
    except cbor2.CBORDecodeEOF:
        raise MessageError(f"the frame of {len(data)} bytes ends inside its CBOR item") from None
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise MessageError(f"the frame of {len(data)} bytes is not a CBOR item: {error.__cause__ or error}") from None
    if source.tell() != len(data):
        raise MessageError(f"the frame has {len(data) - source.tell()} bytes after its CBOR item")
    return value


def shown(value: object) -> str:
    """The start of a value, for an error."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def read_map(value: object, where: str) -> dict[object, object]:
    """A map."""
    if not isinstance(value, dict):
        raise MessageError(f"{where} must be a map, not {shown(value)}")
    return value


def field(fields: dict[object, object], name: str, where: str) -> object:
    """A field that must be there."""
    try:
        return fields[name]
    except KeyError:
        raise MessageError(f"{where} lacks {name}") from None


def read_variant(value: object, where: str) -> tuple[str, object]:
    """An externally tagged enum: its name and what belongs to it."""
    if isinstance(value, str):
        return value, None
    if not isinstance(value, dict) or len(value) != 1:
        raise MessageError(f"{where} must be a text or a map with one key, not {shown(value)}")
    ((name, body),) = value.items()
    if not isinstance(name, str):
        raise MessageError(f"{where} has the key {shown(name)}, which must be a text")
    return name, body


def read_integer(value: object, low: int, high: int, where: str) -> int:
    """An integer from `low` to `high`."""
    if type(value) is not int:
        raise MessageError(f"{where} must be an integer, not {shown(value)}")
    if not low <= value <= high:
        raise MessageError(f"{where} is {value}, it may be {low} to {high}")
    return value


def read_text(value: object, where: str) -> str:
    """A text."""
    if not isinstance(value, str):
        raise MessageError(f"{where} must be a text, not {shown(value)}")
    return value


def read_bytes(value: object, where: str) -> bytes:
    """A byte string, or an array of integers that stands for one."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, list):
        if not set(map(type, value)) <= {int}:
            raise MessageError(f"{where} must be an array of integers or a byte string")
        try:
            return bytes(value)
        except ValueError:
            raise MessageError(f"{where} has an integer that is not 0 to 255") from None
    raise MessageError(f"{where} must be a byte string or an array of integers, not {shown(value)}")


T = TypeVar("T")


def read_optional(value: object, where: str, read: Callable[[object, str], T]) -> T | None:
    """None, or what `read` makes of it."""
    return None if value is None else read(value, where)


def read_array(value: object, where: str) -> Sequence[object]:
    """An array."""
    if not isinstance(value, list):
        raise MessageError(f"{where} must be an array, not {shown(value)}")
    return cast("list[object]", value)
