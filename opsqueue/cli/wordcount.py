"""What the demo computes: how often each identifier stands in Python source files. Knows nothing of queues."""

from __future__ import annotations

import keyword
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Final

#: Not the library itself: what is installed beside it, and tests, some of which are broken on purpose.
_SKIPPED: Final = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def standard_library() -> Path:
    """Where Python keeps its own modules."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(directory: Path) -> list[str]:
    """The Python source files under `directory`, sorted; without tests and installed packages."""
    found = directory.rglob("*.py")
    return sorted(str(file) for file in found if _SKIPPED.isdisjoint(file.relative_to(directory).parts))


def count_identifiers(path: str) -> dict[str, int]:
    """How often each identifier stands in one source file; as far as it is Python."""
    counts: Counter[str] = Counter()
    with open(path, "rb") as file:
        try:
            for token in tokenize.tokenize(file.readline):
                if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
                    counts[token.string] += 1
        except (tokenize.TokenError, SyntaxError, UnicodeDecodeError):  # what stands before the error counts
            return dict(counts)
    return dict(counts)


def total(results: Iterable[dict[str, int]]) -> Counter[str]:
    """The sum over all files."""
    sum_of_all: Counter[str] = Counter()
    for result in results:
        sum_of_all.update(result)
    return sum_of_all
