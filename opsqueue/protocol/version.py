"""The version that a server tells its peers: `v` and a semantic version."""

from __future__ import annotations

from opsqueue._version import VERSION


def own_version() -> str:
    """This version, such as `v0.1.0`."""
    return f"v{VERSION}"
