"""The parent trace context of an insert: three request headers as the JSON text that the submission keeps."""

from __future__ import annotations

import msgspec
from multidict import CIMultiDictProxy

#: The headers of W3C trace context and baggage; those that may be repeated are joined with commas.
_SINGLE = ("traceparent",)
_REPEATABLE = ("tracestate", "baggage")

NO_CARRIER = "{}"


def carrier_from_headers(headers: CIMultiDictProxy[str]) -> str:
    """The carrier as JSON text: exactly those of the three headers that came; `{}` when none did."""
    carrier: dict[str, str] = {}
    for name in (*_SINGLE, *_REPEATABLE):
        values = headers.getall(name, None)
        if values is None or (name in _SINGLE and len(values) > 1):
            continue
        value = ",".join(values)
        # bytes that are not UTF-8 come as lone surrogates, which JSON text cannot hold; a context is ASCII anyway
        if value.isascii():
            carrier[name] = value
    return msgspec.json.encode(carrier).decode() if carrier else NO_CARRIER
