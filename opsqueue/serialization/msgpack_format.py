"""MessagePack, for operations that programs in other languages read or write."""

from __future__ import annotations

from typing import Any, Final, cast

import msgpack as library  # type: ignore[import-untyped]

from opsqueue.exceptions import DeserializationError, SerializationError

__all__ = ["MsgpackFormat", "msgpack"]

#: What the library's `timestamp` calls aware datetimes in UTC.
_AWARE_DATETIMES: Final = 3


class MsgpackFormat:
    """MessagePack: the values of JSON, bytes, maps with any key, and aware datetimes, which arrive in UTC."""

    def dumps(self, obj: Any) -> bytes:
        """`obj` as MessagePack. Raises SerializationError, which names the type."""
        try:
            return cast("bytes", library.packb(obj, use_bin_type=True, datetime=True))
        except (TypeError, ValueError, OverflowError) as error:
            raise SerializationError(str(error)) from error

    def loads(self, data: bytes) -> Any:
        """The value in `data`. Raises DeserializationError."""
        try:
            return library.unpackb(data, raw=False, strict_map_key=False, timestamp=_AWARE_DATETIMES)
        except (ValueError, TypeError, OverflowError) as error:
            raise DeserializationError(f"this is not MessagePack: {str(error) or type(error).__name__}") from error


#: MessagePack, to be given to a call as `serialization_format`.
msgpack: Final = MsgpackFormat()
