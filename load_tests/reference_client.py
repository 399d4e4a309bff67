"""The reference's published client (PyPI `opsqueue` 0.30.3, a wheel for CPython 3.12), in an environment of its own.

Used by the benchmark and by the interoperability tests. Runs it unmodified, in processes of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

VERSION = "0.30.3"
ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = Path(__file__).resolve().parent / "reference_programs"
#: Kept between runs; made anew when it is not complete.
ENVIRONMENT = ROOT / ".venv-reference"


def find_python312() -> str | None:
    """A CPython 3.12: $OPSQUEUE_PYTHON312, then python3.12 on the PATH, then pyenv's."""
    told = os.environ.get("OPSQUEUE_PYTHON312")
    if told:
        return told
    found = shutil.which("python3.12")
    if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
        return found  # pyenv's shims are on the PATH also where their version is not selected
    versions = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.12*/bin/python3.12"))
    return str(versions[-1]) if versions else None


class ReferenceClient:
    """Installs the client once; each call runs it."""

    def __init__(self, python312: str) -> None:
        self.python = ENVIRONMENT / "bin" / "python"
        done = ENVIRONMENT / f"complete-{VERSION}"
        if not done.exists():
            subprocess.run([python312, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
            subprocess.run([str(self.python), "-m", "pip", "install", "--quiet", f"opsqueue=={VERSION}"], check=True)
            done.touch()

    def start(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        """Run one of the programs in `reference_programs/`; its output is captured."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "OPSQUEUE_"))}
        return subprocess.Popen(
            [str(self.python), str(PROGRAMS / f"{program}.py"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=PROGRAMS,  # never the repository: there the name opsqueue means ours
        )

    def roundtrip(self, address: str, store: Path, *, chunks: int, chunk_size: int, consumers: int) -> float:
        """Seconds of one submission of `chunks` chunks of `chunk_size` no-op operations with that many consumers."""
        store.mkdir(exist_ok=True)
        url = f"file://{store}"
        running = [self.start("consumer", address, url) for _ in range(consumers)]
        try:
            for each in running:
                assert each.stdout is not None
                if each.stdout.readline().strip() != "ready":
                    raise RuntimeError(f"the reference's consumer did not start: {each.stdout.read()}")
            producer = self.start("producer", address, url, str(chunks * chunk_size), str(chunk_size))
            output, _ = producer.communicate(timeout=300)
            if producer.returncode != 0:
                raise RuntimeError(f"the reference's producer failed:\n{output}")
            return float(output.split()[-1])
        finally:
            for each in running:
                each.kill()
                each.communicate()
