"""CBOR that keeps more types than plain CBOR does: the default format. Knows nothing of chunks.

What plain cbor2 can write is written as cbor2 writes it, byte for byte, so that the reference's programs read it; the
rest goes into one tag of ours, around a pair of a name and a value. A name only selects one of the codecs that this
program has; data can never make it import or call anything else.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime
from decimal import Decimal
from itertools import chain
from types import ModuleType
from typing import Any, Final, TypeVar, cast
from uuid import UUID

import cbor2
import msgspec

from opsqueue._speedups.nesting import nests_deeper
from opsqueue.exceptions import DeserializationError, SerializationError

__all__ = ["TAG", "CborFormat", "Codec", "cbor", "register_codec"]

T = TypeVar("T")

#: The tag around `[name, value]`: the letters OPSQ, from the range that IANA leaves to whoever comes first.
TAG: Final = 0x4F505351

#: Containers in each other, the chunk's own list among them: as many as cbor2 reads.
MAX_DEPTH: Final = 400

#: Names that begin so are ours.
_OWN_NAMES: Final = "opsqueue."
_DATETIME: Final = "opsqueue.datetime"
_DECIMAL: Final = "opsqueue.decimal"
_ARRAY: Final = "opsqueue.ndarray"
_SCALAR: Final = "opsqueue.numpy"

#: What every chunk is made of; a codec for one of these would change how the chunk itself is written.
_PLAIN_TYPES: Final = frozenset({bool, int, float, str, bytes, list, tuple, dict, type(None)})
#: cbor2 writes these and what is derived from them without asking, unless it gets `encoders`, which take its time.
_WRITTEN_BY_CBOR2: Final = (
    *(bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset),
    *(date, Decimal, UUID),
)

#: A float or a Decimal that is not finite, as cbor2 writes both. (The search skips to the first byte by memchr.)
_NOT_FINITE: Final = re.compile(rb"\xf9[\x7c\x7e\xfc]\x00")
_SEQUENCES: Final = frozenset({list, tuple, set, frozenset})
_KNOWN: Final = _SEQUENCES | {dict, bool, int, float, str, bytes, type(None), datetime, date, UUID}


class Codec(msgspec.Struct, frozen=True):
    """How values of one class travel. `encode` gives any value that the format can write, `decode` makes it back.

    `name` is what the data says; it must stay the same as long as data with it exists. It holds for `cls` itself, not
    for what is derived from it. Lists inside of a dict's key arrive at `decode` as tuples.
    """

    cls: type
    name: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


class CborFormat:
    """CBOR with numpy arrays, naive datetimes and all Decimals, and the classes of its codecs. Thread-safe.

    `dumps` raises SerializationError, which names the type. `loads` raises cbor2.CBORDecodeError for what is no CBOR
    and DeserializationError for a value inside that it cannot make: an unknown name, or a codec that failed.
    """

    def __init__(self, codecs: Iterable[Codec] = ()) -> None:
        self._codecs: dict[str, Codec] = {}
        self._by_class: dict[type, Codec] = {}
        self._encoders: dict[type, cbor2.EncoderHook] = {}
        self._always_with_encoders = False
        self._decoders: Mapping[int, cbor2.SemanticDecoderCallback] = {TAG: self._decode_tag}
        self._builtin: dict[str, Callable[[Any], Any]] = {
            _DATETIME: _to_naive_datetime,
            _DECIMAL: _to_decimal,
            _ARRAY: _to_array,
            _SCALAR: _to_scalar,
        }
        self._use({})
        for codec in codecs:
            self.register(codec)

    def register(self, codec: Codec) -> None:
        """Adds a codec. Raises ValueError when its name or class is taken or unfit.

        The same class again (also one that was defined anew, as when a module is reloaded) replaces its codec.
        """
        if not codec.name or codec.name.startswith(_OWN_NAMES):
            raise ValueError(
                f"the name of a codec must be a text that does not begin with opsqueue., not {codec.name!r}"
            )
        if codec.cls in _PLAIN_TYPES:
            raise ValueError(f"{codec.cls.__name__} is written as CBOR has it and cannot have a codec; derive a class")
        others = {name: other for name, other in self._codecs.items() if not _same_class(other.cls, codec.cls)}
        if codec.name in others:
            taken = _name_of(others[codec.name].cls)
            raise ValueError(f"the name {codec.name!r} is taken by {taken}; choose another for {_name_of(codec.cls)}")
        self._use({**others, codec.name: codec})

    def _use(self, codecs: dict[str, Codec]) -> None:
        # new dicts, so that a dumps or loads in another thread sees the old or the new ones
        by_class = {codec.cls: codec for codec in codecs.values()}
        hook = self._encode_by_codec
        self._encoders = {Decimal: _encode_decimal, datetime: _encode_datetime, **dict.fromkeys(by_class, hook)}
        self._by_class = by_class
        self._codecs = codecs
        self._always_with_encoders = any(issubclass(cls, _WRITTEN_BY_CBOR2) for cls in by_class)

    def dumps(self, obj: Any) -> bytes:
        """`obj` as CBOR. Raises SerializationError."""
        _check_depth(obj)
        if self._always_with_encoders:
            return self._dumps_with_encoders(obj)
        try:
            data = cbor2.dumps(obj, default=self._encode_other)
        except cbor2.CBOREncodeError:
            return self._dumps_with_encoders(obj)  # a naive datetime, or an error to be told
        except (ValueError, OverflowError, RecursionError) as error:
            raise SerializationError(str(error)) from error
        if b"\xf9" in data and _NOT_FINITE.search(data) and _may_hold_decimals(obj):
            return self._dumps_with_encoders(obj)
        return data

    def _dumps_with_encoders(self, obj: Any) -> bytes:
        try:
            return cbor2.dumps(obj, encoders=self._encoders, default=self._encode_other)
        except (cbor2.CBOREncodeError, ValueError, OverflowError, RecursionError) as error:
            raise SerializationError(str(error)) from error

    def loads(self, data: bytes) -> Any:
        """The value in `data`. Raises cbor2.CBORDecodeError and DeserializationError."""
        try:
            return cbor2.loads(data, semantic_decoders=self._decoders)
        except cbor2.CBORDecodeError as error:
            ours = error.__cause__  # cbor2 wraps what our decoder raises, once a tag
            while ours is not None and not isinstance(ours, DeserializationError):
                ours = ours.__cause__
            if ours is None:
                raise
            raise ours from ours.__cause__

    def _encode_other(self, encoder: cbor2.CBOREncoder, value: Any) -> None:
        if type(value) in self._by_class:
            self._encode_by_codec(encoder, value)
            return
        numpy = sys.modules.get("numpy")  # a program without it has no such values
        if numpy is not None and type(value) is numpy.ndarray:
            encoder.encode_semantic(TAG, [_ARRAY, _numpy_values().from_array(value)])
        elif numpy is not None and isinstance(value, numpy.generic):
            encoder.encode_semantic(TAG, [_SCALAR, _numpy_values().from_scalar(value)])
        else:
            raise SerializationError(
                f"a value of the type {_name_of(type(value))} cannot be encoded as CBOR; "
                "convert it, or register a codec for its class: opsqueue.common.register_codec"
            )

    def _encode_by_codec(self, encoder: cbor2.CBOREncoder, value: Any) -> None:
        codec = self._by_class[type(value)]
        try:
            encoded = codec.encode(value)
        except Exception as error:
            raise SerializationError(
                f"the codec {codec.name!r} could not encode a {_name_of(codec.cls)}: {error!r}"
            ) from error
        _check_depth(encoded)
        encoder.encode_semantic(TAG, [codec.name, encoded])

    def _decode_tag(self, content: Any, _immutable: bool) -> Any:
        match content:
            case [str(name), value]:
                pass
            case _:
                raise DeserializationError(f"the CBOR tag {TAG} must hold a name and a value")
        codec = self._codecs.get(name)
        decode = self._builtin.get(name) if codec is None else codec.decode
        if decode is None:
            raise DeserializationError(
                f"the data holds a value named {name!r}, for which this program has no codec; "
                "register it as the program that wrote the data did: opsqueue.common.register_codec"
            )
        try:
            return decode(value)
        except Exception as error:
            raise DeserializationError(f"a value named {name!r} could not be decoded: {error}") from error


def _check_depth(value: object) -> None:
    # cbor2 could not read it again; far deeper, writing it would end the process
    if nests_deeper(value, MAX_DEPTH):
        raise SerializationError(f"lists and dicts are nested more than {MAX_DEPTH} deep, or hold themselves")


def _encode_datetime(encoder: cbor2.CBOREncoder, value: datetime) -> None:
    if value.utcoffset() is None:
        encoder.encode_semantic(TAG, [_DATETIME, value.replace(tzinfo=None).isoformat()])
    else:
        encoder.encode_datetime(value)


def _encode_decimal(encoder: cbor2.CBOREncoder, value: Decimal) -> None:
    if value.is_finite():
        encoder.encode_decimal(value)
    else:
        encoder.encode_semantic(TAG, [_DECIMAL, str(value)])


def _to_naive_datetime(text: Any) -> datetime:
    return datetime.fromisoformat(text)


def _to_decimal(text: Any) -> Decimal:
    return Decimal(cast("str", text))


def _numpy_values() -> ModuleType:
    from opsqueue.serialization import numpy_values  # most programs have no such values

    return numpy_values


def _to_array(value: Any) -> Any:
    return _numpy_values().to_array(value)


def _to_scalar(value: Any) -> Any:
    return _numpy_values().to_scalar(value)


def _may_hold_decimals(obj: Any) -> bool:
    """False when `obj` is made of plain values only. One level after the other; it has been encoded, so they end."""
    level = [obj]
    while level:
        types = set(map(type, level))
        if not types <= _KNOWN:
            return True
        sequences = [] if types.isdisjoint(_SEQUENCES) else [value for value in level if type(value) in _SEQUENCES]
        maps = [value for value in level if type(value) is dict] if dict in types else []
        level = [*chain.from_iterable(sequences), *chain.from_iterable(maps)]
        level.extend(chain.from_iterable(map(dict.values, maps)))
    return False


def _same_class(one: type, other: type) -> bool:
    return one is other or _name_of(one) == _name_of(other)


def _name_of(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


#: The format of a call that names none or names cbor2; `register_codec` adds to it.
cbor: Final = CborFormat()


def register_codec(cls: type[T], name: str, encode: Callable[[T], Any], decode: Callable[[Any], T]) -> None:
    """Lets values of `cls` pass through the default format, in the program that writes them and the one that reads.

    See `Codec` for the arguments. Raises ValueError when the name or the class is taken or unfit. For codecs that are
    not shared by the whole program give the calls a format of your own: `CborFormat(codecs=[…])`.
    """
    cbor.register(Codec(cls, name, encode, decode))
