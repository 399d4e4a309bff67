"""Serialization: what a format claims to keep comes back as it was; the default writes plain values as plain CBOR."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import cbor2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsqueue.client.packing import packed
from opsqueue.common import DEFAULT_SERIALIZATION_FORMAT
from opsqueue.exceptions import IncorrectUsageError, SerializationError
from opsqueue.serialization import CborFormat, Codec, SerializationFormat, cbor, decode_chunk, encode_chunk
from opsqueue.serialization import json as json_format
from opsqueue.serialization import msgpack as msgpack_format
from opsqueue.serialization.cbor_format import MAX_DEPTH
from opsqueue.serialization.compression import MAGIC

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
INT64 = st.integers(-(2**63), 2**64 - 1)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
FLOATS = st.floats(allow_nan=False)


def nested(leaves: st.SearchStrategy[Any], keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=12)


PLAIN = nested(st.none() | st.booleans() | st.integers() | FLOATS | TEXTS | st.binary(), TEXTS | INT64 | st.binary())
ZONES = st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(
    lambda offset: timezone(timedelta(minutes=offset // timedelta(minutes=1)))
)
RICH = nested(
    st.datetimes()
    | st.datetimes(min_value=datetime(2, 1, 1), max_value=datetime(9998, 1, 1), timezones=ZONES)
    | st.dates()
    | st.uuids()
    | st.decimals(allow_nan=False)
    | st.sets(INT64),
    TEXTS,
)
JSON = nested(st.none() | st.booleans() | INT64 | FINITE | TEXTS, TEXTS)
MSGPACK = nested(st.none() | st.booleans() | INT64 | FLOATS | TEXTS | st.binary(), TEXTS | INT64 | st.binary())
AWARE = st.datetimes(min_value=datetime(1971, 1, 1), max_value=datetime(9998, 1, 1), timezones=st.just(UTC))

DTYPES = ["?", "<i1", "<u2", ">i4", "<i8", "<f2", "<f4", ">f8", "<c16", "<U5", "|S3", "|V4", "<M8[us]", "<m8[D]"]
DTYPES_OF_FIELDS: list[Any] = [
    [("a", "<i4"), ("b", "|S3")],
    np.dtype([("a", "u1"), ("b", "<f8", (2, 3))], align=True),
    [("outer", [("inner", "<f4")]), (("title", "name"), "<u2")],
]


def same(format_: SerializationFormat, value: Any, compression: Any = None) -> None:
    (back,) = decode_chunk(encode_chunk((value,), format_, compression), format_)
    assert back == value
    assert type(back) is type(value)


@given(PLAIN | RICH)
def test_the_default_keeps_every_value_it_claims(value: Any) -> None:
    same(DEFAULT_SERIALIZATION_FORMAT, value)
    same(cbor, value, "zstd")


@given(st.lists(PLAIN))
def test_plain_values_are_written_as_cbor2_writes_them(ops: list[Any]) -> None:
    assert encode_chunk(tuple(ops), DEFAULT_SERIALIZATION_FORMAT) == cbor2.dumps(tuple(ops))


@given(st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 0.0]) | st.text()))
def test_numbers_that_are_not_finite_are_written_as_cbor2_writes_them(ops: list[Any]) -> None:
    assert encode_chunk(tuple(ops), DEFAULT_SERIALIZATION_FORMAT) == cbor2.dumps(tuple(ops))


@pytest.mark.parametrize(
    "value",
    [datetime(2024, 5, 6, tzinfo=UTC), date(2024, 5, 6), Decimal("1.50"), UUID(int=7), {1, 2}, 1 << 100, (1, (2,))],
)
def test_what_cbor2_knows_is_written_as_cbor2_writes_it(value: Any) -> None:
    assert cbor.dumps((value,)) == cbor2.dumps((value,))


@given(st.decimals())
def test_every_decimal_keeps_its_digits(value: Decimal) -> None:
    (back,) = cbor.loads(cbor.dumps((value,)))
    assert repr(back) == repr(value)


@given(JSON)
def test_json_keeps_what_json_has(value: Any) -> None:
    same(json_format, value)
    same(json_format, value, "zstd")


@given(MSGPACK | AWARE)
def test_msgpack_keeps_what_it_claims(value: Any) -> None:
    same(msgpack_format, value)
    same(msgpack_format, value, "zstd")


@pytest.mark.parametrize("dtype", DTYPES + DTYPES_OF_FIELDS, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)], ids=str)
def test_arrays_come_back_with_dtype_shape_and_elements(dtype: Any, shape: tuple[int, ...]) -> None:
    array: Any = np.zeros(shape, dtype)
    if array.dtype.kind in "iuf" and array.size:
        array.flat = range(array.size)
    (back,) = cbor.loads(cbor.dumps((array,)))
    assert type(back) is np.ndarray
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert (back == array).all()  # not its bytes: numpy copies no padding
    assert back.flags.writeable


def test_a_view_of_every_second_element_comes_back() -> None:
    array = np.arange(24, dtype="<i4").reshape(4, 6)[::2, ::-3]
    (back,) = cbor.loads(cbor.dumps((array,)))
    assert (back == array).all()


@pytest.mark.parametrize("value", [np.float32(1.5), np.int16(-3), np.bool_(True), np.datetime64("2024-01-02", "D")])
def test_numpy_scalars_come_back_with_their_type(value: Any) -> None:
    (back,) = cbor.loads(cbor.dumps((value,)))
    assert type(back) is type(value)
    assert back == value


Point = namedtuple("Point", "x y")  # the untyped kind is tested


@dataclass(frozen=True)
class Money:
    amount: Decimal
    currency: str


def money_codec(**changes: Any) -> Codec:
    given: dict[str, Any] = {
        "cls": Money,
        "name": "money",
        "encode": lambda money: [money.amount, money.currency],
        "decode": lambda pair: Money(*pair),
    }
    return Codec(**{**given, **changes})


def test_a_class_with_a_codec_comes_back_as_itself_wherever_it_is() -> None:
    format_ = CborFormat([money_codec()])
    price = Money(Decimal("1.20"), "EUR")
    value = {"list": [price, price], "deep": {"a": (price,)}}
    (back,) = format_.loads(format_.dumps((value,)))
    assert back == {"list": [price, price], "deep": {"a": [price]}}


def test_a_derived_plain_class_with_a_codec_comes_back_as_itself() -> None:
    format_ = CborFormat([Codec(Point, "point", list, lambda pair: Point(*pair))])
    (back,) = format_.loads(format_.dumps((Point(1, 2),)))
    assert type(back) is Point


@pytest.mark.parametrize(
    "codec",
    [money_codec(name=""), money_codec(name="opsqueue.money"), money_codec(cls=dict), money_codec(cls=Point)],
    ids=["no name", "our name", "a plain class", "a name that is taken"],
)
def test_an_unfit_codec_is_refused(codec: Codec) -> None:
    format_ = CborFormat([money_codec()])
    with pytest.raises(ValueError, match=r"codec|taken"):
        format_.register(codec)


@pytest.mark.parametrize(
    "format_", [DEFAULT_SERIALIZATION_FORMAT, json_format, msgpack_format], ids=["cbor", "json", "mp"]
)
def test_an_operation_that_cannot_be_encoded_is_named_by_type_and_index(format_: SerializationFormat) -> None:
    ops = [*range(17), Money(Decimal(1), "EUR"), 18] if format_ is not json_format else [*range(17), 1j, 18]
    with pytest.raises(SerializationError, match=r"operation 17: .*(Money|complex)") as caught:
        list(packed(ops, 5, format_))
    assert caught.value.index == 17


def test_an_array_of_objects_is_refused_by_name() -> None:
    with pytest.raises(SerializationError, match=r"operation 1: .*object"):
        encode_chunk((1, np.array([object()])), DEFAULT_SERIALIZATION_FORMAT)


def test_what_a_codec_raises_is_the_cause() -> None:
    format_ = CborFormat([money_codec(encode=lambda money: money.missing)])
    with pytest.raises(SerializationError, match=r"'money'.*missing") as caught:
        encode_chunk((Money(Decimal(1), "EUR"),), format_)
    assert isinstance(caught.value.__cause__, AttributeError)


def test_a_wrong_compression_is_refused_before_an_operation_is_taken() -> None:
    taken = iter([1])
    with pytest.raises(IncorrectUsageError, match=r"'gzip'"):
        packed(taken, 1, DEFAULT_SERIALIZATION_FORMAT, "gzip")  # type: ignore[arg-type]
    assert next(taken) == 1


def test_bytes_that_only_look_compressed_come_back_as_they_were() -> None:
    class Bare:
        def dumps(self, obj: Any) -> bytes:
            return bytes(obj[0])

        def loads(self, data: bytes) -> Any:
            return [data]

    assert decode_chunk(encode_chunk((MAGIC + b"abc",), Bare()), Bare()) == [MAGIC + b"abc"]


def test_importing_the_producer_loads_no_format_but_the_default() -> None:
    program = "import sys, opsqueue.producer; print([n for n in ('numpy', 'orjson', 'msgpack') if n in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def lists_in_each_other(depth: int) -> Any:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def dicts_in_each_other(depth: int) -> Any:
    value: dict[Any, Any] = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def keys_in_each_other(depth: int) -> Any:
    return {tuples_in_each_other(depth - 1): 1}


def tuples_in_each_other(depth: int) -> Any:
    value: tuple[Any, ...] = ()
    for _ in range(depth - 1):
        value = (value,)
    return value


def sets_in_each_other(depth: int) -> Any:
    value: frozenset[Any] = frozenset()
    for _ in range(depth // 2 - 1):
        value = frozenset([value])
    return value


@pytest.mark.parametrize(
    "made", [lists_in_each_other, dicts_in_each_other, keys_in_each_other, tuples_in_each_other, sets_in_each_other]
)
def test_what_is_nested_too_deep_to_be_read_is_not_written(made: Any) -> None:
    # the chunk itself is one more
    deepest = encode_chunk([made(MAX_DEPTH - 2)], DEFAULT_SERIALIZATION_FORMAT)
    back = decode_chunk(deepest, DEFAULT_SERIALIZATION_FORMAT)
    assert encode_chunk(back, DEFAULT_SERIALIZATION_FORMAT) == deepest
    for depth in (MAX_DEPTH + 2, 50_000):
        with pytest.raises(SerializationError, match="operation 1: lists and dicts are nested more than 400 deep"):
            encode_chunk([0, made(depth)], DEFAULT_SERIALIZATION_FORMAT)


def test_a_value_that_holds_itself_is_not_written() -> None:
    itself: list[Any] = []
    itself.append(itself)
    with pytest.raises(SerializationError, match="or hold themselves"):
        cbor.dumps([itself])
    codec = Codec(Point, "point", lambda _: lists_in_each_other(50_000), lambda _: None)
    with pytest.raises(SerializationError, match="nested more than 400 deep"):
        CborFormat([codec]).dumps([Point(1, 2)])
