"""A server of the benchmark's own: one process tree, a database in a temporary directory, gone at the end.

Reads what its processes use (processor time, memory, bytes written) from /proc; judges nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: The interpreter that runs the benchmark runs the server.
COMMAND = (sys.executable, "-m", "opsqueue", "serve")
START_WITHIN_S = 60.0


@dataclass(frozen=True)
class ServerProcess:
    port: int
    process: subprocess.Popen[bytes]
    directory: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def database(self) -> Path:
        return self.directory / "opsqueue.db"

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

    def pss_bytes(self) -> int:
        """Memory of all its processes, what they share counted once."""
        return sum(_field(Path(f"/proc/{pid}/smaps_rollup"), "Pss:") * 1024 for pid in self.pids())

    def written_bytes(self) -> int:
        """Bytes that its processes have sent towards the disk: database and write-ahead log."""
        return sum(_field(Path(f"/proc/{pid}/io"), "write_bytes:") for pid in self.pids())

    def file_bytes(self) -> tuple[int, int]:
        """Size of the database and of its write-ahead log."""
        wal = self.database.with_name(self.database.name + "-wal")
        return self.database.stat().st_size, wal.stat().st_size if wal.exists() else 0

    def kill(self) -> None:
        """SIGKILL to the supervisor, which takes all its processes with it; returns when they are gone."""
        watched = [os.pidfd_open(pid) for pid in self.pids()]
        try:
            self.process.kill()
            self.process.wait()
            for each in watched:
                _wait_for_end(each)
        finally:
            for each in watched:
                os.close(each)


def _field(path: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(name))


def _wait_for_end(pidfd: int) -> None:
    if not select.select([pidfd], [], [], START_WITHIN_S)[0]:
        raise RuntimeError("a process of the server outlived its supervisor's SIGKILL")


@contextlib.contextmanager
def running_server(*flags: str, directory: str | None = None, home: Path | None = None) -> Iterator[ServerProcess]:
    """A server on a free port, with `flags`.

    Its database is in `home`, which the caller removes, or else in a fresh directory under `directory` (default: the
    system's for temporary files, which should be on a disk when durability is measured).
    """
    with contextlib.ExitStack() as stack:
        if home is None:
            home = stack.enter_context(fresh_directory(directory))
        process = stack.enter_context(_started(home, flags))
        yield process


@contextlib.contextmanager
def fresh_directory(parent: str | None = None) -> Iterator[Path]:
    """An empty directory that is removed at the end."""
    home = Path(tempfile.mkdtemp(prefix="opsqueue-bench-", dir=parent))
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def _started(home: Path, flags: tuple[str, ...]) -> Iterator[ServerProcess]:
    reading, writing = os.pipe()
    command = [
        *COMMAND, "--port", "0", "--report-bound-port-pipe", str(writing),
        "--database-filename", str(home / "opsqueue.db"), *flags,
    ]  # fmt: skip
    with (home / "server.log").open("ab") as log:
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
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
