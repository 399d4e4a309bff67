"""What this machine, or the container that we run in, has: cores and memory. Measures nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

#: Limits of control groups, version 2 and version 1; a file that is absent or says "max" sets none.
_MEMORY_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def memory() -> int:
    """Bytes of memory that this process may use, as far as the kernel says."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([installed, *_limits()])


def _limits() -> list[int]:
    found = []
    for path in _MEMORY_LIMITS:
        try:
            text = path.read_text().strip()
        except OSError:  # no such control group: no such limit
            continue
        if text.isdigit():
            found.append(int(text))
    return found
