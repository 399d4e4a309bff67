"""JSON by orjson, for operations that programs in other languages read or write."""

from __future__ import annotations

from typing import Any, Final

import orjson

from opsqueue.exceptions import DeserializationError, SerializationError

__all__ = ["JsonFormat", "json"]


class JsonFormat:
    """JSON in UTF-8. What JSON does not have does not come back as it was: a datetime or UUID arrives as a text."""

    def dumps(self, obj: Any) -> bytes:
        """`obj` as JSON. Raises SerializationError, which names the type."""
        try:
            return orjson.dumps(obj)
        except orjson.JSONEncodeError as error:
            raise SerializationError(str(error)) from error

    def loads(self, data: bytes) -> Any:
        """The value of the JSON in `data`. Raises DeserializationError."""
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise DeserializationError(f"this is not JSON: {error}") from error


#: JSON, to be given to a call as `serialization_format`.
json: Final = JsonFormat()
