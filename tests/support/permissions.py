"""Commands to whom the permissions of files apply, also where the tests are run by root."""

from __future__ import annotations

import os


def bound_by_permissions() -> list[str]:
    """The words before such a command. It stays the same user, who has to be able to read the interpreter."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
