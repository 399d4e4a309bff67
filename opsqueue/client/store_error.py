"""What every store raises."""

from __future__ import annotations


class StoreError(Exception):
    """An object could not be read or written; the text names it and the cause."""
