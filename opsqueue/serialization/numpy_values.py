"""numpy's arrays and scalars as plain values and back. Imports numpy when the first one arrives, never before.

A value is `[dtype, bytes]`, an array `[dtype, shape, bytes]`: its elements in C order. A dtype is numpy's own text for
it (`<f8`, `|S3`, `<M8[us]`), `[base, shape]` for an array in a field, or a map with the fields of a structured one.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from opsqueue.exceptions import DeserializationError, SerializationError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]
    DType = np.dtype[Any]

__all__ = ["from_array", "from_scalar", "to_array", "to_scalar"]

#: Texts that are taken for a dtype: numbers, booleans, texts, bytes, times and raw bytes; nothing with pointers.
_DTYPE: Final = re.compile(r"[<>|=](?:[biufcSUV]\d{1,10}|[mM]8(?:\[\d{0,10}[A-Za-zμ]{1,7}(?:/\d{1,10})?\])?)")


def from_array(array: Array) -> list[Any]:
    """An array as `[dtype, shape, bytes]`. Raises SerializationError for a dtype that holds objects."""
    return [_dtype_described(array.dtype), list(array.shape), array.tobytes()]


def from_scalar(scalar: np.generic) -> list[Any]:
    """A numpy scalar as `[dtype, bytes]`. Raises SerializationError for a dtype that holds objects."""
    return [_dtype_described(scalar.dtype), scalar.tobytes()]


def to_array(value: Any) -> Array:
    """The array that `from_array` wrote, writable. Raises DeserializationError, ValueError and TypeError."""
    match value:
        case [dtype, [*shape], bytes(data)]:
            return _array(_dtype(dtype), shape, data)
    raise DeserializationError("an array is a dtype, a shape and bytes")


def to_scalar(value: Any) -> Any:
    """The scalar that `from_scalar` wrote. Raises DeserializationError, ValueError, TypeError."""
    match value:
        case [dtype, bytes(data)]:
            return _array(_dtype(dtype), [], data)[()]
    raise DeserializationError("a numpy scalar is a dtype and bytes")


def _array(dtype: DType, shape: list[Any], data: bytes) -> Array:
    import numpy as np

    size = dtype.itemsize
    for length in shape:
        if type(length) is not int or length < 0:
            raise DeserializationError(f"a shape is made of numbers from 0, not {length!r}")
        size *= length
    if size != len(data):
        raise DeserializationError(f"an array of {dtype} with the shape {shape} has {size} bytes, not {len(data)}")
    return np.ndarray(tuple(shape), dtype, buffer=data).copy()


@lru_cache(maxsize=256)
def _dtype_described(dtype: DType) -> Any:
    described = None if dtype.hasobject else _described(dtype)
    if described is None or _dtype(described) != dtype:
        raise SerializationError(
            f"a numpy value of the dtype {dtype} cannot be encoded; convert it to one of numbers, texts, bytes or times"
        )
    return described


def _described(dtype: DType) -> Any:
    """The dtype as plain values; None when it has no such form."""
    if dtype.itemsize == 0:
        return None
    if dtype.subdtype is not None:
        base = _described(dtype.subdtype[0])
        return None if base is None else [base, list(dtype.subdtype[1])]
    if dtype.names is None or dtype.fields is None:
        return dtype.str if _DTYPE.fullmatch(dtype.str) else None
    fields = [dtype.fields[name] for name in dtype.names]
    formats = [_described(field[0]) for field in fields]
    titles = [field[2] if len(field) > 2 else None for field in fields]
    if None in formats or not all(title is None or isinstance(title, str) for title in titles):
        return None
    structure: dict[str, Any] = {
        "names": list(dtype.names),
        "formats": formats,
        "offsets": [field[1] for field in fields],
        "itemsize": dtype.itemsize,
    }
    if any(titles):
        structure["titles"] = titles
    if dtype.isalignedstruct:
        structure["aligned"] = True
    return structure


def _dtype(described: Any) -> DType:
    dtype = _any_dtype(described)
    if dtype.itemsize == 0:
        # a shape of any size would fit to no bytes
        raise DeserializationError(f"{described!r} is a dtype without bytes")
    return dtype


def _any_dtype(described: Any) -> DType:
    try:
        import numpy as np
    except ImportError as error:
        raise DeserializationError("it is a numpy value, and numpy is not installed here: pip install numpy") from error

    match described:
        case str(text) if _DTYPE.fullmatch(text):
            return np.dtype(text)
        case [base, [*shape]]:
            return np.dtype((_dtype(base), tuple(shape)))
        case {"names": [*names], "formats": [*formats], "offsets": [*offsets], "itemsize": int(itemsize)}:
            structure: dict[str, Any] = {
                "names": [str(name) for name in names],
                "formats": [_dtype(member) for member in formats],
                "offsets": [int(offset) for offset in offsets],
                "itemsize": itemsize,
                "aligned": described.get("aligned") is True,
            }
            if "titles" in described:
                structure["titles"] = [None if title is None else str(title) for title in described["titles"]]
            return np.dtype(structure)  # type: ignore[call-overload, no-any-return]  # its stub knows literals only
    raise DeserializationError(f"{described!r} is not a dtype")
