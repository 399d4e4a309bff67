"""Imports two large libraries without the parts of them that a server never uses, which took a third of its start.

To be imported before them: structlog loads rich, if it is installed, for coloured tracebacks; aiohttp reads the
system's certificates for its client. Anything in a server that wants those must load them itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: What OpenSSL reads instead of the system's certificates.
_CERTIFICATE_VARIABLES: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR")


@contextmanager
def _without_module(name: str) -> Iterator[None]:
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # the documented way to make an import fail
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def _without_certificates() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _CERTIFICATE_VARIABLES}
    os.environ.update(dict.fromkeys(_CERTIFICATE_VARIABLES, os.devnull))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


with _without_module("rich"):
    import structlog  # noqa: F401
with _without_certificates():
    import aiohttp  # noqa: F401
