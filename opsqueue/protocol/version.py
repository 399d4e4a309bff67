"""The version that a server tells its peers: `v` and a semantic version, from the installed package's metadata."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version


@cache
def own_version() -> str:
    """This installation's version, such as `v0.1.0`."""
    return "v" + version("opsqueue")
