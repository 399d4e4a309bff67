"""`object_store_options`: checked, and sorted into what obstore takes apart. No I/O.

The names are obstore's own (its documentation: ClientConfig, RetryConfig, and S3Config, GCSConfig, AzureConfig), with
or without the prefix of the store, in upper or lower case; and `durable` of our own for directories.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

import msgspec

from opsqueue.exceptions import NewObjectStoreClientError

Options = Sequence[tuple[str, str]]

#: Of the HTTP client (obstore.store.ClientConfig).
_CLIENT: Final = frozenset(
    (
        "allow_http", "allow_invalid_certificates", "connect_timeout", "default_content_type", "http1_only",
        "http2_keep_alive_interval", "http2_keep_alive_timeout", "http2_keep_alive_while_idle", "http2_only",
        "pool_idle_timeout", "pool_max_idle_per_host", "proxy_url", "proxy_ca_certificate", "proxy_excludes",
        "randomize_addresses", "read_timeout", "root_certificate", "timeout", "user_agent",
    )
)  # fmt: skip
#: Of repeated requests (obstore.store.RetryConfig, and its BackoffConfig).
_RETRY: Final = frozenset(("max_retries", "retry_timeout"))
_BACKOFF: Final = frozenset(("init_backoff", "max_backoff", "base"))
_PREFIXES: Final = ("aws_", "google_", "azure_")
_SWITCHES: Final = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class StoreOptions(msgspec.Struct):
    """What a store is opened with. `durable`: of a directory, an object is on the disk when `put` returns."""

    config: dict[str, str] = msgspec.field(default_factory=dict)
    client: dict[str, str] = msgspec.field(default_factory=dict)
    retry: dict[str, Any] = msgspec.field(default_factory=dict)
    durable: bool = False


def sorted_options(options: Options) -> StoreOptions:
    """Raises TypeError when `options` are no pairs, NewObjectStoreClientError for a value that cannot be."""
    found = StoreOptions()
    for name, value in _pairs(options):
        bare = next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)
        if name == "durable":
            found.durable = _switch(name, value)
        elif bare in _CLIENT:
            found.client[bare] = value
        elif bare == "max_retries":
            found.retry[bare] = _number(name, value)
        elif bare == "base":
            found.retry.setdefault("backoff", {})[bare] = _number(name, value)
        elif bare in _BACKOFF:
            found.retry.setdefault("backoff", {})[bare] = _duration(name, value)
        elif bare in _RETRY:
            found.retry[bare] = _duration(name, value)
        else:
            found.config[name] = value
    return found


def with_environment(client: dict[str, str], prefix: str) -> dict[str, str] | None:
    """The HTTP client's options with those of the environment, which obstore looks at only when it is given none."""
    if not client:
        return None
    found = {name: os.environ[prefix + name.upper()] for name in _CLIENT if prefix + name.upper() in os.environ}
    return found | client


def _pairs(options: Options) -> list[tuple[str, str]]:
    if isinstance(options, dict | str) or not isinstance(options, Sequence):
        raise TypeError(
            f"object_store_options must be a sequence of (name, value) tuples, not {type(options).__name__}"
        )
    for pair in options:
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise TypeError(f"object_store_options must hold (name, value) tuples of two strings, not {pair!r}")
    return [(name.lower(), value) for name, value in options]


def _switch(name: str, value: str) -> bool:
    try:
        return _SWITCHES[value.lower()]
    except KeyError:
        raise NewObjectStoreClientError(f"object store option {name} must be true or false, not {value!r}") from None


def _number(name: str, value: str) -> int:
    if not value.isdecimal():
        raise NewObjectStoreClientError(f"object store option {name} must be a number, not {value!r}")
    return int(value)


def _duration(name: str, value: str) -> timedelta:
    from opsqueue.server.values import parse_duration  # few programs need it

    try:
        return timedelta(seconds=parse_duration(value))
    except ValueError as error:
        raise NewObjectStoreClientError(f"object store option {name}: {error}") from error
