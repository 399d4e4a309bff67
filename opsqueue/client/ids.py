"""New prefixes for submissions: UUIDv7 text, so that names in a store sort by time. Keeps no state."""

from __future__ import annotations

import os
import time
import uuid


def new_prefix() -> str:
    """48 bits of milliseconds since the Unix epoch, version 7, variant 2, the rest random (RFC 9562, section 5.7)."""
    milliseconds = time.time_ns() // 1_000_000
    noise = int.from_bytes(os.urandom(10), "big")
    high = (milliseconds & (1 << 48) - 1) << 16 | 0x7000 | noise >> 68
    low = 0b10 << 62 | noise & (1 << 62) - 1
    return str(uuid.UUID(int=high << 64 | low))
