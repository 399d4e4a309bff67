"""The version that a server tells its peers: `v` and a semantic version, from the installed package's metadata."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def own_version() -> str:
    """This installation's version, such as `v0.1.0`; `v0.0.0` for a source tree that is not installed."""
    try:
        return "v" + version("opsqueue")
    except PackageNotFoundError:
        return "v0.0.0"
