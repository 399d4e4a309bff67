"""zstd from the standard library where it has it, else from the package that gives older ones the same module."""

import sys

if sys.version_info >= (3, 14):
    from compression import zstd as zstd
else:
    from backports import zstd as zstd

__all__ = ["zstd"]
