"""Programs of the tests in processes of their own: ready when they say so, and always gone at the end."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"


@contextlib.contextmanager
def python_process(program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A program of `programs/`, by the interpreter that runs the tests; it says `ready` on a line of its own."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAMS / f"{program}.py"), *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        yield process
    finally:
        process.kill()
        process.communicate()
