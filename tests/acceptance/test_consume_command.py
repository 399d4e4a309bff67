"""`opsqueue consume`: a pool of processes that runs a function, through the real command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from opsqueue.producer import ProducerClient, SubmissionStatus
from tests.support.server import Server, is_running, wait_until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def producer(server: Server, store_url: str) -> ProducerClient:
    return ProducerClient(server.address, store_url)


class Pool:
    """One running `opsqueue consume`."""

    def __init__(self, log: Path, *words: str) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "opsqueue", "consume", *words], stdout=output, stderr=output, cwd=ROOT
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def children(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]


@contextmanager
def pool(tmp_path: Path, server: Server | None, store_url: str, *words: str) -> Iterator[Pool]:
    where = [] if server is None else ["--server", server.address]
    running = Pool(tmp_path / "pool.log", *words, "--object-store", store_url, *where)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait(10)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """The command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "opsqueue", "consume", *words],
        capture_output=True, text=True, timeout=60, cwd=ROOT, check=False,
    )  # fmt: skip


def test_a_function_is_run_by_as_many_processes_as_asked(
    server: Server, producer: ProducerClient, store_url: str, tmp_path: Path
) -> None:
    with pool(tmp_path, server, store_url, "tests.support.tasks:pid", "--processes", "3") as running:
        wait_until(lambda: server.metric("consumers_connected_count") == 3, "all processes are connected", within=30)
        pids = set(producer.run_submission(range(600), chunk_size=2))
        assert pids == set(running.children())
        assert len(pids) == 3


def test_sigterm_finishes_the_chunk_in_hand_and_gives_the_others_back(
    server: Server, producer: ProducerClient, store_url: str, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    marker.touch()
    with pool(tmp_path, server, store_url, "tests.support.tasks:until_removed", "--processes", "1") as running:
        submission = producer.insert_submission([str(marker)] * 5, chunk_size=1)
        wait_until(Path(f"{marker}.begun").exists, "the first chunk has begun", within=30)
        running.process.terminate()
        wait_until(lambda: "ending after the chunks in hand" in running.log, "it is stopping")
        marker.unlink()
        assert running.process.wait(20) == 0
    status = producer.get_submission_status(submission)
    assert isinstance(status, SubmissionStatus.InProgress)
    assert status.submission.chunks_done == 1
    assert server.metric("chunks_retried_count") == 0
    assert server.metric("reserver_chunks_reserved_count") == 0


def test_a_second_sigterm_ends_it_at_once_without_a_retry(
    server: Server, producer: ProducerClient, store_url: str, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    marker.touch()
    with pool(tmp_path, server, store_url, "tests.support.tasks:until_removed", "--processes", "1") as running:
        submission = producer.insert_submission([str(marker)], chunk_size=1)
        wait_until(Path(f"{marker}.begun").exists, "the chunk has begun", within=30)
        running.process.terminate()
        wait_until(lambda: "ending after the chunks in hand" in running.log, "it is stopping")
        running.process.terminate()
        assert running.process.wait(20) == 3
    status = producer.get_submission_status(submission)
    assert isinstance(status, SubmissionStatus.InProgress)
    assert status.submission.chunks_done == 0
    wait_until(lambda: server.metric("reserver_chunks_reserved_count") == 0, "the chunk is available again")
    assert server.metric("chunks_retried_count") == 0


def test_a_process_that_dies_is_replaced_and_its_chunk_is_done_by_another(
    server: Server, producer: ProducerClient, store_url: str, tmp_path: Path
) -> None:
    with pool(tmp_path, server, store_url, "tests.support.tasks:die_once", "--processes", "2") as running:
        results = producer.run_submission([str(tmp_path / "died")], chunk_size=1)
        assert list(results) == ["alive"]
        wait_until(lambda: "was killed by signal 9" in running.log, "the death is in the log")
        wait_until(lambda: len(running.children()) == 2, "the process is replaced", within=20)


def test_the_processes_end_with_a_killed_supervisor(server: Server, store_url: str, tmp_path: Path) -> None:
    with pool(tmp_path, server, store_url, "tests.support.tasks:double", "--processes", "2") as running:
        wait_until(lambda: server.metric("consumers_connected_count") == 2, "all processes are connected", within=30)
        children = running.children()
        running.process.kill()
        wait_until(lambda: not any(map(is_running, children)), "the processes are gone")


def test_health_is_told_by_a_file_and_a_port(
    server: Server, store_url: str, tmp_path: Path, unused_tcp_port: int
) -> None:
    health = tmp_path / "health"
    words = ["--processes", "1", "--health-file", str(health), "--health-port", str(unused_tcp_port)]

    def status() -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{unused_tcp_port}/", timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except urllib.error.URLError:
            return 0

    with pool(tmp_path, server, store_url, "tests.support.tasks:double", *words) as running:
        wait_until(lambda: status() == 200 and health.exists(), "it is healthy", within=30)
        server.stop()
        wait_until(lambda: status() == 503 and not health.exists(), "it is not healthy without a server", within=30)
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(20) == 0
    assert not health.exists()


def test_per_chunk_and_a_strategy(server: Server, producer: ProducerClient, store_url: str, tmp_path: Path) -> None:
    tasks = tmp_path / "chunk_tasks.py"
    tasks.write_text("def total(ops, chunk):\n    return [sum(ops), chunk.chunk_index.id]\n")
    words = ["--per", "chunk", "--strategy", "PreferDistinct(customer, Oldest)", "--processes", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "opsqueue", "consume", "chunk_tasks:total", "--object-store", store_url, "--server",
         server.address, *words],
        cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert list(producer.run_submission(range(6), chunk_size=3)) == [3, 0, 12, 1]
    finally:
        process.terminate()
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["no_such_module:f", "--object-store", "memory://"], "there is no module 'no_such_module'"),
        (["json", "--object-store", "memory://"], "write module:function"),
        (["json:nothing", "--object-store", "memory://"], "json has no nothing"),
        (["json:dumps"], "--object-store URL is missing"),
        (["json:dumps", "--object-store", "ftp://x"], "none that is known"),
        (["json:dumps", "--object-store", "memory://", "--server", "ftp://x"], "the scheme 'ftp' is not known"),
        (["json:dumps", "--object-store", "memory://", "--strategy", "Fastest"], "'Fastest' is not known"),
        (["json:dumps", "--object-store", "memory://", "--processes", "0"], "1 to 1,000"),
        (["json:dumps", "--object-store", "memory://", "--connect-timeout", "soon"], "expected a duration"),
        (["json:dumps", "--object-store", "memory://", "--object-store-option", "x"], "NAME=VALUE"),
        (["json:dumps", "--object-store", "memory://", "--health-port", "99999"], "--health-port 99999 cannot be used"),
    ],
)
def test_wrong_words_are_one_clear_line_and_exit_code_2(words: list[str], complaint: str) -> None:
    done = run(*words)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert complaint in last
    assert "Traceback" not in done.stderr


def test_a_server_that_is_not_there_is_given_up_on_when_asked(unused_tcp_port: int) -> None:
    done = run(
        "json:dumps", "--object-store", "memory://", "--connect-timeout", "1s",
        "--server", f"127.0.0.1:{unused_tcp_port}",
    )  # fmt: skip
    assert done.returncode == 4
    assert "no connection within 1 s" in done.stderr.strip().splitlines()[-1]


def test_a_server_that_is_something_else_ends_it(server: Server) -> None:
    done = run("json:dumps", "--object-store", "memory://", "--server", server.address + "/elsewhere")
    assert done.returncode == 1
    assert "404" in done.stderr.strip().splitlines()[-1]
