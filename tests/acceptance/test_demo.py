"""`opsqueue demo` and the example programs, on real files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opsqueue.cli.wordcount import count_identifiers
from tests.support.server import Server, is_running, wait_until

ROOT = Path(__file__).parents[2]
DEMO = [sys.executable, "-m", "opsqueue", "demo"]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A directory of small source files, with what the demo must cope with."""
    directory = tmp_path / "sources"
    (directory / "tests").mkdir(parents=True)
    for number in range(25):
        (directory / f"module{number:02}.py").write_text("alpha = beta\n" * (number + 1) + "for gamma in alpha: pass\n")
    (directory / "broken.py").write_text('delta = """never closed\n')
    (directory / "notpython.py").write_bytes(b"\xff\xfe\x00")
    (directory / "notes.txt").write_text("epsilon\n")
    (directory / "tests" / "test_it.py").write_text("zeta = 1\n")
    return directory


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where the demo's temporary directories go."""
    directory = tmp_path / "home"
    directory.mkdir()
    return directory


def run_demo(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DEMO, *arguments], capture_output=True, text=True, timeout=90, env={**os.environ, "TMPDIR": str(home)}
    )


def descendants(pid: int) -> list[int]:
    """All processes under `pid`."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [found for child in map(int, children) for found in (child, *descendants(child))]


def test_the_demo_counts_the_identifiers_of_a_directory_and_checks_them(sources: Path, home: Path) -> None:
    result = run_demo(home, str(sources), "--check", "--consumers", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "27 files, 7 chunks, 0 retries" in result.stdout
    assert "operations per second" in result.stdout
    assert [line.split("│")[1:3] for line in result.stdout.splitlines() if "alpha" in line] == [
        [" alpha      ", "   350 "]
    ]
    assert "equal" in result.stdout
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_behind(home: Path, number: int) -> None:
    process = subprocess.Popen(
        DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(home)}
    )
    try:
        # A supervisor, its two children at least, and consumers.
        wait_until(lambda: len(descendants(process.pid)) >= 4, "everything is running", within=30)
        others = descendants(process.pid)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors
    wait_until(lambda: not any(map(is_running, others)), "all its processes are gone", within=1)
    assert list(home.iterdir()) == []


def test_a_killed_demo_leaves_no_process_behind(home: Path) -> None:
    process = subprocess.Popen(DEMO, stdout=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(home)})
    try:
        wait_until(lambda: len(descendants(process.pid)) >= 4, "everything is running", within=30)
        others = descendants(process.pid)
    finally:
        process.kill()
        process.wait()
    begun = time.monotonic()
    wait_until(lambda: not any(map(is_running, others)), "all its processes are gone", within=2)
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nonexistent"], "opsqueue: demo: /nonexistent is not a directory\n"),
        (["--consumers", "0"], "opsqueue: argument --consumers: expected a number from 1 to 1,000, not '0'; see"),
        (["--chekc"], "opsqueue: unrecognized arguments: --chekc; see opsqueue demo --help\n"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(home: Path, arguments: list[str], message: str) -> None:
    result = run_demo(home, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_a_directory_without_sources_is_one_line_and_exit_code_2(home: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run_demo(home, str(tmp_path / "empty"))
    assert (result.returncode, result.stdout) == (2, "")
    assert "no Python source files" in result.stderr


def test_broken_sources_count_as_far_as_they_are_python(sources: Path) -> None:
    assert count_identifiers(str(sources / "broken.py")) == {"delta": 1}
    assert count_identifiers(str(sources / "notpython.py")) == {}


@pytest.fixture
def example_consumers(server: Server, store_url: str) -> Iterator[None]:
    """Two consumers of the example."""
    command = [sys.executable, "examples/wordcount_consumer.py", server.address, store_url]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    # Before that, Ctrl-C would end them in the middle of their imports.
    wait_until(lambda: server.metric("consumers_connected_count") == 2, "both are connected", within=30)
    yield
    for process in processes:
        process.send_signal(signal.SIGINT)
    assert [process.wait(10) for process in processes] == [0, 0]


@pytest.mark.usefixtures("example_consumers")
def test_the_example_programs_count_the_identifiers_of_a_directory(
    server: Server, store_url: str, tmp_path: Path
) -> None:
    for number in range(21):
        (tmp_path / f"module{number}.py").write_text("alpha = beta\nif alpha: gamma\n")
    command = [sys.executable, "examples/wordcount_producer.py", server.address, store_url, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert [line.split() for line in result.stdout.splitlines()] == [["42", "alpha"], ["21", "beta"], ["21", "gamma"]]
