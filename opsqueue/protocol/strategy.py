"""Strategies: the order in which a consumer wants its chunks. Values and their forms on the wire; picks no chunk.

On the wire, in CBOR as in JSON: `"Oldest"`, `"Newest"`, `"Random"`, or a map with one key and its fields, such as
`{"PreferDistinct": {"meta_key": text, "underlying": strategy}}` (docs/protocol.md lists all). Between the server's
processes: canonical bytes, equal exactly for equal strategies. They are a letter and what it needs, in this order:
meta_key (the length of its UTF-8 as 2 bytes little-endian, and those bytes), a number (8 bytes little-endian, signed),
and the canonical bytes of what is nested.
"""

from __future__ import annotations

import struct
from typing import Any, TypeAlias

import msgspec

from opsqueue.protocol.errors import StrategyError

__all__ = [
    "MAX_CANONICAL_BYTES",
    "MAX_DEPTH",
    "MAX_META_KEY_BYTES",
    "Highest",
    "Lowest",
    "MaxSimultaneous",
    "Newest",
    "Oldest",
    "OrElse",
    "PreferDistinct",
    "Random",
    "SelectOnly",
    "Strategy",
    "StrategyError",
    "beyond_reference",
    "canonical",
    "from_canonical",
    "parse",
    "to_wire",
]

#: Strategies that hold others, nested at most this many deep.
MAX_DEPTH = 8
#: Bytes of a meta_key's UTF-8: as long as a name in strategic metadata may be.
MAX_META_KEY_BYTES = 256
#: Bytes of a strategy in canonical form; long enough for eight keys of the longest kind.
MAX_CANONICAL_BYTES = 4096


class Oldest(msgspec.Struct, frozen=True):
    """The smallest submission id first, chunks ascending."""


class Newest(msgspec.Struct, frozen=True):
    """The largest submission id first, chunks descending."""


class Random(msgspec.Struct, frozen=True):
    """Any available chunk, each as likely as every other."""


class Highest(msgspec.Struct, frozen=True):
    """The largest value of strategic metadata `meta_key` first, then as Oldest; submissions without a value last."""

    meta_key: str


class Lowest(msgspec.Struct, frozen=True):
    """The smallest value of strategic metadata `meta_key` first, then as Oldest; submissions without a value last."""

    meta_key: str


class PreferDistinct(msgspec.Struct, frozen=True):
    """First the values of strategic metadata `meta_key` with the fewest chunks in flight, then `underlying`."""

    meta_key: str
    underlying: Strategy


class SelectOnly(msgspec.Struct, frozen=True):
    """Only submissions whose strategic metadata `meta_key` has this value, in the order of `underlying`."""

    meta_key: str
    value: int
    underlying: Strategy


class MaxSimultaneous(msgspec.Struct, frozen=True):
    """Only submissions whose value of `meta_key` has fewer than `limit` chunks in flight, whoever holds them.

    Submissions without the key are not limited. Counted anew after each chunk of a reservation.
    """

    meta_key: str
    limit: int
    underlying: Strategy


class OrElse(msgspec.Struct, frozen=True):
    """`second` where `first` has no chunk; asked anew for each chunk of a reservation."""

    first: Strategy
    second: Strategy


Strategy: TypeAlias = (
    Oldest | Newest | Random | Highest | Lowest | PreferDistinct | SelectOnly | MaxSimultaneous | OrElse
)

_PLAIN: dict[str, Strategy] = {"Oldest": Oldest(), "Newest": Newest(), "Random": Random()}
_WITH_FIELDS: dict[str, type[Strategy]] = {
    kind.__name__: kind for kind in (Highest, Lowest, PreferDistinct, SelectOnly, MaxSimultaneous, OrElse)
}
_LETTERS: dict[type[Strategy], bytes] = {
    Oldest: b"O", Newest: b"N", Random: b"R", Highest: b"H", Lowest: b"L",
    PreferDistinct: b"P", SelectOnly: b"S", MaxSimultaneous: b"M", OrElse: b"E",
}  # fmt: skip
_BY_LETTER = {letter[0]: kind for kind, letter in _LETTERS.items()}
#: By field: what a strategy may hold in it.
_NESTED = frozenset({"underlying", "first", "second"})
_BOUNDS = {"value": (-(2**63), 2**63 - 1), "limit": (1, 2**32 - 1)}
_KNOWN = "Oldest, Newest, Random, Highest, Lowest, PreferDistinct, SelectOnly, MaxSimultaneous and OrElse"


def beyond_reference(strategy: Strategy) -> str | None:
    """The name of the first part that a server without the feature `strategies` does not know; None: there is none."""
    if not isinstance(strategy, Oldest | Newest | Random | PreferDistinct):
        return type(strategy).__name__
    return beyond_reference(strategy.underlying) if isinstance(strategy, PreferDistinct) else None


def parse(obj: object) -> Strategy:
    """The strategy in decoded CBOR or JSON. Raises StrategyError, which says what is wrong and where."""
    return _parse(obj, "strategy", 0)


def _parse(obj: object, where: str, depth: int) -> Strategy:
    if isinstance(obj, str):
        plain = _PLAIN.get(obj)
        if plain is None:
            raise StrategyError(f"{where} is {_shown(obj)}, which is no strategy: known are {_KNOWN}")
        return plain
    if not isinstance(obj, dict) or len(obj) != 1:
        raise StrategyError(f"{where} must be a text or a map with one key, not {_shown(obj)}: known are {_KNOWN}")
    ((name, body),) = obj.items()
    kind = _WITH_FIELDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise StrategyError(f"{where} is {_shown(name)}, which is no strategy with fields: known are {_KNOWN}")
    where = f"{where}.{name}"
    if not isinstance(body, dict):
        raise StrategyError(f"{where} must be a map, not {_shown(body)}")
    values: dict[str, Any] = {}
    for field in kind.__struct_fields__:
        if field not in body:
            raise StrategyError(f"{where} lacks {field}")
        given = body[field]
        if field in _NESTED:
            if depth + 1 > MAX_DEPTH:
                raise StrategyError(f"strategy nests more than {MAX_DEPTH} deep, at {where[:200]}")
            given = _parse(given, f"{where}.{field}", depth + 1)
        else:
            _check(field, given, where)
        values[field] = given
    return kind(**values)


def _check(field: str, given: object, where: str) -> None:
    """Raises StrategyError unless a field that holds no strategy has a value that it may have."""
    if field == "meta_key":
        if not isinstance(given, str):
            raise StrategyError(f"{where}.meta_key must be a text, not {_shown(given)}")
        _encoded(given, where)
        return
    least, most = _BOUNDS[field]
    if isinstance(given, bool) or not isinstance(given, int) or not least <= given <= most:
        raise StrategyError(f"{where}.{field} must be an integer from {least} to {most}, not {_shown(given)}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _encoded(meta_key: str, where: str) -> bytes:
    try:
        encoded = meta_key.encode()
    except UnicodeEncodeError as error:
        raise StrategyError(f"{where}.meta_key {_shown(meta_key)} is not valid Unicode: {error.reason}") from None
    if len(encoded) > MAX_META_KEY_BYTES:
        raise StrategyError(f"{where}.meta_key has {len(encoded)} bytes, it may have {MAX_META_KEY_BYTES}")
    return encoded


def to_wire(strategy: Strategy) -> object:
    """`strategy` as a CBOR or JSON encoder takes it."""
    name = type(strategy).__name__
    if name in _PLAIN:
        return name
    given = {field: getattr(strategy, field) for field in strategy.__struct_fields__}
    return {name: {field: to_wire(value) if field in _NESTED else value for field, value in given.items()}}


def canonical(strategy: Strategy) -> bytes:
    """`strategy` as canonical bytes. Raises StrategyError where it could not be parsed from the wire either."""
    parts: list[bytes] = []
    _put(strategy, parts, 0)
    whole = b"".join(parts)
    if len(whole) > MAX_CANONICAL_BYTES:
        raise StrategyError(
            f"strategy is too large: it takes {len(whole)} bytes in the server, it may take {MAX_CANONICAL_BYTES}"
        )
    return whole


def _put(strategy: Strategy, parts: list[bytes], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise StrategyError(f"strategy nests more than {MAX_DEPTH} deep")
    parts.append(_LETTERS[type(strategy)])
    where = f"strategy.{type(strategy).__name__}"
    for field in strategy.__struct_fields__:
        given = getattr(strategy, field)
        if field in _NESTED:
            _put(given, parts, depth + 1)
            continue
        _check(field, given, where)
        if field == "meta_key":
            encoded = _encoded(given, where)
            parts.append(len(encoded).to_bytes(2, "little") + encoded)
        else:
            parts.append(struct.pack("<q", given))


def from_canonical(data: bytes) -> Strategy:
    """The strategy in canonical bytes. Raises StrategyError for anything that `canonical` does not make."""
    if len(data) > MAX_CANONICAL_BYTES:
        raise StrategyError(f"canonical strategy: {len(data)} bytes, more than {MAX_CANONICAL_BYTES}")
    strategy, end = _take(data, 0, 0)
    if end != len(data):
        raise StrategyError(f"canonical strategy: byte {end} of {len(data)} must be the end")
    return strategy


def _take(data: bytes, at: int, depth: int) -> tuple[Strategy, int]:
    kind = _BY_LETTER.get(data[at]) if at < len(data) else None
    if kind is None:
        letters = ", ".join(letter.decode() for letter in _LETTERS.values())
        raise StrategyError(f"canonical strategy: byte {at} of {len(data)} must be one of {letters}")
    if depth > MAX_DEPTH:
        raise StrategyError(f"strategy nests more than {MAX_DEPTH} deep")
    at += 1
    values: dict[str, Any] = {}
    for field in kind.__struct_fields__:
        if field in _NESTED:
            values[field], at = _take(data, at, depth + 1)
        elif field == "meta_key":
            size = int.from_bytes(data[at : at + 2], "little")
            end = at + 2 + size
            if len(data) < at + 2 or len(data) < end or size > MAX_META_KEY_BYTES:
                raise StrategyError(f"canonical strategy: the length at byte {at} is wrong")
            try:
                values["meta_key"] = data[at + 2 : end].decode()
            except UnicodeDecodeError as error:
                raise StrategyError(f"canonical strategy: the meta_key at byte {at + 2} is not UTF-8") from error
            at = end
        else:
            if len(data) < at + 8:
                raise StrategyError(f"canonical strategy: the number at byte {at} is cut off")
            (values[field],) = struct.unpack_from("<q", data, at)
            _check(field, values[field], f"canonical strategy, byte {at}")
            at += 8
    return kind(**values), at
