"""A server in processes of its own, for tests: started, watched, killed, and always gone at the end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

#: Longer than any start takes, also on a machine that runs other tests at the same time.
START_WITHIN_S = 20.0
STOP_WITHIN_S = 10.0

#: The command under test, run by the interpreter that runs the tests.
OPSQUEUE = (sys.executable, "-m", "opsqueue", "serve")


def flags_of(settings: dict[str, object]) -> list[str]:
    """`{"max_chunk_retries": 3, "external_checkpoints": True}` as flags."""
    flags = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else "--no-" + flag[2:])
        else:
            flags += [flag, str(value)]
    return flags


def wait_until(condition: Callable[[], bool], what: str, within: float = 10.0) -> None:
    """Return as soon as `condition` holds; an AssertionError that names `what` if it does not in time (seconds)."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not within {within} seconds: {what}"
        time.sleep(0.005)  # paces the look at a condition


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Server:
    """One server: `start` it, talk to `url`, `stop`, `kill` or `restart` it. Its settings are given as keywords."""

    def __init__(
        self,
        directory: Path,
        settings: dict[str, object],
        command: Sequence[str] = OPSQUEUE,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.settings: dict[str, object] = {
            "port": 0,
            "frontends": 1,
            "database_filename": directory / "opsqueue.db",
            **settings,
        }
        self.command = list(command)
        self._environment = {**os.environ, **(environment or {})}
        self._log_path = directory / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The supervisor."""
        assert self._process is not None, "the server was not started"
        return self._process

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def database(self) -> Path:
        return Path(str(self.settings["database_filename"]))

    def start(self) -> Server:
        """Start it and wait until it serves."""
        reading = self.launch()
        try:
            if not select.select([reading], [], [], START_WITHIN_S)[0]:
                raise AssertionError(f"the server did not say its port within {START_WITHIN_S} seconds:\n{self.log()}")
            reported = os.read(reading, 2)
        finally:
            os.close(reading)
        if len(reported) != 2:
            code = self.process.wait(STOP_WITHIN_S)
            raise AssertionError(f"the server did not start, exit code {code}:\n{self.log()}")
        self.port = int.from_bytes(reported, "big")
        return self

    def launch(self) -> int:
        """Start it without waiting; the end of the pipe on which it will report its port."""
        reading, writing = os.pipe()
        try:
            with self._log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    [*self.command, *flags_of({**self.settings, "report_bound_port_pipe": writing})],
                    pass_fds=[writing],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=Path(__file__).parents[2],
                    env=self._environment,
                )
        finally:
            os.close(writing)
        return reading

    def stop(self, number: int = signal.SIGTERM) -> float:
        """Ask it to stop and wait for that; the seconds it took."""
        begun = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(STOP_WITHIN_S)
        return time.monotonic() - begun

    def kill(self) -> None:
        """SIGKILL the supervisor, and wait until all its children are gone too."""
        children = [pid for pids in self.pids().values() for pid in pids]
        self.process.kill()
        self.process.wait(STOP_WITHIN_S)
        wait_until(lambda: not any(map(is_running, children)), "the children of a killed supervisor are gone")

    def restart(self, *, kill: bool = False) -> Server:
        """Stop (or kill) it and start it again on the same port and database."""
        if kill:
            self.kill()
        else:
            self.stop()
        self.settings["port"] = self.port
        return self.start()

    def pids(self) -> dict[str, list[int]]:
        """The children by role: `writer` and `frontend`, in the order of their names."""
        roles: dict[str, list[tuple[str, int]]] = {"writer": [], "frontend": []}
        supervisor = self.process.pid
        try:
            children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            children = []
        for pid in map(int, children):
            try:
                name = Path(f"/proc/{pid}/comm").read_text().strip()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if name == "opsqueue-writer":
                roles["writer"].append((name, pid))
            elif name.startswith("opsqueue-fe"):
                roles["frontend"].append((name, pid))
        return {role: [pid for _, pid in sorted(found)] for role, found in roles.items()}

    def kill_child(self, role: str, index: int = 0) -> int:
        """SIGKILL the writer or a front-end; the pid that it had."""
        pid = self.pids()[role][index]
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_for_replacement(self, role: str, of: int) -> int:
        """Wait until another process has the place of `of`; its pid."""
        count = 1 if role == "writer" else int(str(self.settings["frontends"]))

        def replaced() -> bool:
            pids = self.pids()[role]
            return len(pids) == count and of not in pids

        wait_until(replaced, f"the {role} {of} is replaced")
        return self.pids()[role][-1]

    def answers(self) -> bool:
        """Whether /ping says pong now."""
        try:
            with urllib.request.urlopen(f"{self.url}/ping", timeout=2) as answer:
                return bool(answer.read() == b"pong")
        except (urllib.error.URLError, OSError):
            return False

    def wait_until_healthy(self) -> None:
        """Wait until /ping says pong."""
        wait_until(self.answers, "the server answers pong")

    def metric(self, name: str) -> float:
        """The value now; of a metric per process, the sum."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        values = [float(line.split()[-1]) for line in lines if line.startswith((name + " ", name + "{"))]
        assert values, f"no metric {name}"
        return sum(values)

    def log(self) -> str:
        """Everything that it has written so far."""
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    def close(self) -> None:
        """End it by whatever it takes."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                self.kill()
