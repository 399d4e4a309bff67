"""Starts and stops the servers that opsqueue is compared with, each with its durable setting and its own directory.

They come from the distribution's packages; where one is not installed, `Missing` names the command that installs it.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

START_WITHIN_S = 20.0
#: PostgreSQL refuses to run as root: these users are tried then.
UNPRIVILEGED = ("postgres", "nobody")


class Missing(RuntimeError):
    """{name} is not installed; apt-get install {package}"""

    def __init__(self, name: str, package: str) -> None:
        super().__init__(f"{name} is not installed: apt-get install {package}")


@dataclass(frozen=True)
class Peer:
    """A server that accepts connections on `port` of 127.0.0.1."""

    name: str
    port: int
    process: subprocess.Popen[bytes]

    def cpu_by_process(self) -> dict[str, float]:
        """Processor seconds that the process and all that came from it have used, under its name."""
        return {self.name: sum(_cpu_seconds(pid) for pid in _tree(self.process.pid))}


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [pid, *(each for child in children for each in _tree(int(child)))]


def _cpu_seconds(pid: int) -> float:
    """Its own and that of its children which have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return sum(int(each) for each in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def find_program(name: str, package: str, places: str = "") -> str:
    """The program's path; `places`: a pattern below / where it may be besides PATH."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found:
        return found
    if places:
        candidates = sorted(Path("/").glob(places.lstrip("/") + "/" + name))
        if candidates:
            return str(candidates[-1])
    raise Missing(name, package)


def version_of(program: str, *arguments: str) -> str:
    output = subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout
    return output.strip().splitlines()[0]


def free_port() -> int:
    """One that was free just now: these servers cannot choose their own and say which."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def redis(directory: str | None) -> Iterator[Peer]:
    program = find_program("redis-server", "redis-server")
    with _home(directory) as home:
        port = free_port()
        command = [
            program, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(home), "--daemonize", "no",
            "--save", "", "--appendonly", "yes", "--appendfsync", "always",
        ]  # fmt: skip
        with _running("redis", command, port, home, "Ready to accept connections") as peer:
            yield peer


@contextlib.contextmanager
def beanstalkd(directory: str | None) -> Iterator[Peer]:
    program = find_program("beanstalkd", "beanstalkd")
    with _home(directory) as home:
        port = free_port()
        command = [program, "-l", "127.0.0.1", "-p", str(port), "-b", str(home), "-f", "0"]
        with _running("beanstalkd", command, port, home, ready="") as peer:
            yield peer


@contextlib.contextmanager
def postgresql(directory: str | None) -> Iterator[Peer]:
    initdb = find_program("initdb", "postgresql", "/usr/lib/postgresql/*/bin")
    user = _unprivileged_user()
    with _home(directory, user) as home:
        data = home / "data"
        subprocess.run(
            [initdb, "-D", str(data), "-U", "bench", "-A", "trust", "-E", "UTF8", "--no-locale"],
            check=True, stdout=subprocess.DEVNULL, cwd=home, user=user,
        )  # fmt: skip
        port = free_port()
        command = [
            str(Path(initdb).with_name("postgres")), "-D", str(data), "-p", str(port),
            "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=",
            "-c", "fsync=on", "-c", "synchronous_commit=on",
        ]  # fmt: skip
        with _running("postgres", command, port, home, "ready to accept connections", user) as peer:
            yield peer


def _unprivileged_user() -> str | None:
    """None where this process is not root and its own user will do."""
    if os.geteuid() != 0:
        return None
    for name in UNPRIVILEGED:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise RuntimeError(f"PostgreSQL does not run as root, and there is no user {' or '.join(UNPRIVILEGED)} here")


@contextlib.contextmanager
def _home(parent: str | None, user: str | None = None) -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="opsqueue-peer-", dir=parent))
    try:
        if user is not None:
            shutil.chown(home, user)
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def _running(
    name: str, command: Sequence[str], port: int, home: Path, ready: str, user: str | None = None
) -> Iterator[Peer]:
    """`ready`: what its log says when it serves; empty when it says nothing."""
    log_path = home / "log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, cwd=home, stdout=log, stderr=log, user=user)
    try:
        _wait_until_ready(name, process, port, log_path, ready)
        yield Peer(name, port, process)
    finally:
        process.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown; the others end as well
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(name: str, process: subprocess.Popen[bytes], port: int, log: Path, ready: str) -> None:
    deadline = time.monotonic() + START_WITHIN_S
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{name} did not start:\n{log.read_text(errors='replace')[-2000:]}")
        if ready in log.read_text(errors="replace"):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        time.sleep(0.02)
