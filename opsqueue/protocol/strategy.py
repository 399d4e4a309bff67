"""Strategies: the order in which a consumer wants its chunks. Values and their forms on the wire; picks no chunk.

On the wire, in CBOR as in JSON: `"Oldest"`, `"Newest"`, `"Random"` or
`{"PreferDistinct": {"meta_key": text, "underlying": strategy}}`. Between the server's processes: canonical bytes, equal
exactly for equal strategies: `O`, `N`, `R`, or `P`, the length of meta_key's UTF-8 as 2 bytes little-endian, those
bytes, and the canonical bytes of the underlying strategy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from opsqueue.protocol.errors import StrategyError

__all__ = [
    "MAX_DEPTH",
    "MAX_META_KEY_BYTES",
    "Newest",
    "Oldest",
    "PreferDistinct",
    "Random",
    "Strategy",
    "StrategyError",
    "canonical",
    "from_canonical",
    "parse",
    "to_wire",
]

#: PreferDistinct in PreferDistinct, at most this many; a server ranks by each of them.
MAX_DEPTH = 8
#: Bytes of a meta_key's UTF-8: as long as a name in strategic metadata may be.
MAX_META_KEY_BYTES = 256


@dataclass(frozen=True, slots=True)
class Oldest:
    """The smallest submission id first, chunks ascending."""


@dataclass(frozen=True, slots=True)
class Newest:
    """The largest submission id first, chunks descending."""


@dataclass(frozen=True, slots=True)
class Random:
    """Any available chunk, each as likely as every other."""


@dataclass(frozen=True, slots=True)
class PreferDistinct:
    """First the values of strategic metadata `meta_key` with the fewest chunks in flight, then `underlying`."""

    meta_key: str
    underlying: Strategy


Strategy: TypeAlias = Oldest | Newest | Random | PreferDistinct

_PLAIN: dict[str, Strategy] = {"Oldest": Oldest(), "Newest": Newest(), "Random": Random()}
_NAMES: dict[type[Strategy], str] = {Oldest: "Oldest", Newest: "Newest", Random: "Random"}
_LETTERS: dict[type[Strategy], bytes] = {Oldest: b"O", Newest: b"N", Random: b"R"}
_BY_LETTER: dict[int, Strategy] = {ord("O"): Oldest(), ord("N"): Newest(), ord("R"): Random()}


def parse(obj: object) -> Strategy:
    """The strategy in decoded CBOR or JSON. Raises StrategyError, which says what is wrong and where."""
    keys: list[str] = []
    while not isinstance(obj, str):
        where = ".".join(["strategy", *["PreferDistinct.underlying"] * len(keys)])
        if len(keys) == MAX_DEPTH:
            raise StrategyError(f"strategy nests PreferDistinct more than {MAX_DEPTH} deep")
        meta_key, obj = _prefer_distinct(obj, where)
        keys.append(meta_key)
    strategy = _PLAIN.get(obj)
    if strategy is None:
        where = ".".join(["strategy", *["PreferDistinct.underlying"] * len(keys)])
        raise StrategyError(f"{where} is {_shown(obj)}, which is no strategy: known are {_KNOWN}")
    for meta_key in reversed(keys):
        strategy = PreferDistinct(meta_key, strategy)
    return strategy


_KNOWN = "Oldest, Newest, Random and PreferDistinct"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _prefer_distinct(obj: object, where: str) -> tuple[str, object]:
    if not isinstance(obj, dict) or len(obj) != 1:
        raise StrategyError(f"{where} must be a text or a map with one key, not {_shown(obj)}: known are {_KNOWN}")
    ((name, body),) = obj.items()
    if name != "PreferDistinct":
        raise StrategyError(f"{where} is {_shown(name)}, which is no strategy with fields: known are {_KNOWN}")
    where += ".PreferDistinct"
    if not isinstance(body, dict):
        raise StrategyError(f"{where} must be a map, not {_shown(body)}")
    for field in ("meta_key", "underlying"):
        if field not in body:
            raise StrategyError(f"{where} lacks {field}")
    meta_key = body["meta_key"]
    if not isinstance(meta_key, str):
        raise StrategyError(f"{where}.meta_key must be a text, not {_shown(meta_key)}")
    _check_meta_key(meta_key, where)
    return meta_key, body["underlying"]


def _check_meta_key(meta_key: str, where: str) -> bytes:
    try:
        encoded = meta_key.encode()
    except UnicodeEncodeError as error:
        raise StrategyError(f"{where}.meta_key {_shown(meta_key)} is not valid Unicode: {error.reason}") from None
    if len(encoded) > MAX_META_KEY_BYTES:
        raise StrategyError(f"{where}.meta_key has {len(encoded)} bytes, it may have {MAX_META_KEY_BYTES}")
    return encoded


def to_wire(strategy: Strategy) -> object:
    """`strategy` as a CBOR or JSON encoder takes it."""
    if isinstance(strategy, PreferDistinct):
        return {"PreferDistinct": {"meta_key": strategy.meta_key, "underlying": to_wire(strategy.underlying)}}
    return _NAMES[type(strategy)]


def canonical(strategy: Strategy) -> bytes:
    """`strategy` as canonical bytes. Raises StrategyError where it could not be parsed from the wire either."""
    parts: list[bytes] = []
    while isinstance(strategy, PreferDistinct):
        if len(parts) == MAX_DEPTH:
            raise StrategyError(f"strategy nests PreferDistinct more than {MAX_DEPTH} deep")
        encoded = _check_meta_key(strategy.meta_key, "strategy.PreferDistinct")
        parts.append(b"P" + len(encoded).to_bytes(2, "little") + encoded)
        strategy = strategy.underlying
    return b"".join(parts) + _LETTERS[type(strategy)]


def from_canonical(data: bytes) -> Strategy:
    """The strategy in canonical bytes. Raises StrategyError for anything that `canonical` does not make."""
    keys: list[str] = []
    at = 0
    while data[at : at + 1] == b"P":
        if len(keys) == MAX_DEPTH:
            raise StrategyError(f"strategy nests PreferDistinct more than {MAX_DEPTH} deep")
        end = at + 3 + int.from_bytes(data[at + 1 : at + 3], "little")
        if len(data) < at + 3 or len(data) < end or end - at - 3 > MAX_META_KEY_BYTES:
            raise StrategyError(f"canonical strategy: the length at byte {at + 1} is wrong")
        try:
            keys.append(data[at + 3 : end].decode())
        except UnicodeDecodeError as error:
            raise StrategyError(f"canonical strategy: the meta_key at byte {at + 3} is not UTF-8") from error
        at = end
    strategy = _BY_LETTER.get(data[at]) if len(data) == at + 1 else None
    if strategy is None:
        raise StrategyError(f"canonical strategy: byte {at} of {len(data)} must be the last, and one of O, N, R")
    for meta_key in reversed(keys):
        strategy = PreferDistinct(meta_key, strategy)
    return strategy
