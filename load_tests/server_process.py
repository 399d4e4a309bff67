"""A server of the benchmark's own: one process tree, a database in a temporary directory, gone at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: The console script beside the interpreter that runs the benchmark.
COMMAND = Path(sys.executable).with_name("opsqueue")
START_WITHIN_S = 10.0


@dataclass(frozen=True)
class ServerProcess:
    port: int
    process: subprocess.Popen[bytes]
    directory: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def pids(self) -> list[int]:
        """The supervisor and its children."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [self.process.pid, *map(int, path.read_text().split())]

    def cpu_by_process(self) -> dict[str, float]:
        """Processor seconds that each of its processes has used, by its name in ps."""
        used: dict[str, float] = {}
        for pid in self.pids():
            status = Path(f"/proc/{pid}/stat").read_text()
            name = (
                status[status.index("(") + 1 : status.rindex(")")].removeprefix("opsqueue").strip(" :-") or "supervisor"
            )
            fields = status.rpartition(")")[2].split()
            used[name] = used.get(name, 0.0) + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return used

    def cpu_seconds(self) -> float:
        """Processor time that all its processes have used."""
        return sum(self.cpu_by_process().values())


@contextlib.contextmanager
def running_server(*flags: str, directory: str | None = None) -> Iterator[ServerProcess]:
    """A server on a free port, with `flags`; its database in a fresh directory under `directory` (default: the
    system's for temporary files, which should be on a disk when durability is measured)."""
    home = Path(tempfile.mkdtemp(prefix="opsqueue-bench-", dir=directory))
    reading, writing = os.pipe()
    command = [
        str(COMMAND), "serve", "--port", "0", "--report-bound-port-pipe", str(writing),
        "--database-filename", str(home / "opsqueue.db"), *flags,
    ]  # fmt: skip
    log = (home / "server.log").open("wb")
    process = subprocess.Popen(command, pass_fds=[writing], stdout=log, stderr=log)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            reported = pipe.read(2)
        if len(reported) != 2:
            process.wait(START_WITHIN_S)
            raise RuntimeError(f"the server did not start:\n{(home / 'server.log').read_text()}")
        yield ServerProcess(struct.unpack(">H", reported)[0], process, home)
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()
        shutil.rmtree(home, ignore_errors=True)
