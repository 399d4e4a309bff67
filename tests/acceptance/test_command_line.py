"""The command `opsqueue`, as a user or a service manager runs it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opsqueue._version import VERSION
from tests.conftest import ServerFactory
from tests.support.server import Server, is_running, wait_until


def opsqueue(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opsqueue", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_the_version_is_shown(flag: str) -> None:
    result = opsqueue(flag)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"opsqueue v{VERSION}\n", "")


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["serve", "--help"]])
def test_help_names_every_flag_and_ends_with_examples(arguments: list[str]) -> None:
    result = opsqueue(*arguments, COLUMNS="200")
    assert result.returncode == 0
    for flag in ("--port PORT", "--report-bound-port-pipe FD", "--max-chunk-retries N", "--config FILE"):
        assert flag in result.stdout
    assert "examples:\n  opsqueue serve\n" in result.stdout
    assert "(default: 10 minutes)" in result.stdout


@pytest.mark.parametrize("arguments", [["serve"], []], ids=["serve", "the bare command"])
def test_a_wrong_flag_is_one_line_and_exit_code_2(arguments: list[str]) -> None:
    for flags in (["--port", "x"], ["--no-such-flag"], ["--config", "/nonexistent.toml"]):
        result = opsqueue(*arguments, *flags)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert result.stderr.startswith("opsqueue: ")


def test_a_wrong_command_is_one_line_and_exit_code_2() -> None:
    result = opsqueue("sevre")
    assert (result.returncode, result.stderr) == (2, "opsqueue: unknown command 'sevre'; see opsqueue --help\n")


def test_a_wrong_variable_is_one_line_and_exit_code_2() -> None:
    result = opsqueue("serve", OPSQUEUE_PORT="x")
    assert result.returncode == 2
    assert result.stderr == "opsqueue: environment variable OPSQUEUE_PORT: expected a whole number, not 'x'\n"


def test_the_bare_command_serves(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    server = Server(tmp_path, {}, [sys.executable, "-m", "opsqueue"])
    request.addfinalizer(server.close)
    server.start()
    assert server.answers()


def test_a_server_that_reported_its_port_answers_pong(server: Server) -> None:
    assert server.answers()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_stops_within_a_second(server_factory: ServerFactory, number: int) -> None:
    server = server_factory(frontends=2)
    children = [pid for pids in server.pids().values() for pid in pids]
    with socket.create_connection(("127.0.0.1", server.port)):  # an idle connection holds nothing up
        assert server.stop(number) < 1.0
    assert server.process.returncode == 0
    assert not any(map(is_running, children))


def test_a_killed_server_frees_its_port_within_a_second_and_another_takes_over(server: Server) -> None:
    begun = time.monotonic()
    server.kill()
    assert time.monotonic() - begun < 1.0
    server.settings["port"] = server.port
    server.start()
    assert server.answers()


@pytest.mark.parametrize("role", ["writer", "frontend"])
def test_a_server_answers_again_after_a_child_was_killed(server: Server, role: str) -> None:
    server.wait_for_replacement(role, server.kill_child(role))
    server.wait_until_healthy()


def test_a_second_server_on_the_same_file_is_refused_with_one_line(server: Server, tmp_path: Path) -> None:
    result = opsqueue("serve", "--port", "0", "--database-filename", str(server.database))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert f"(pid {server.process.pid}) holds {server.database}" in result.stderr
    assert server.answers()


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to be read as a header" * 20])
def test_a_file_that_is_no_database_is_refused_with_one_line_and_left_alone(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    result = opsqueue("serve", "--port", "0", "--database-filename", str(file))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert str(file) in result.stderr
    assert file.read_bytes() == content


def test_a_directory_that_does_not_exist_is_refused_with_one_line(tmp_path: Path) -> None:
    result = opsqueue("serve", "--port", "0", "--database-filename", str(tmp_path / "none" / "x.db"))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert str(tmp_path / "none" / "x.db") in result.stderr


def test_the_log_is_json_when_asked_for(server_factory: ServerFactory) -> None:
    server = server_factory(log_format="json")
    events = [json.loads(line) for line in server.log().splitlines()]
    (serving,) = [event for event in events if event["event"] == "opsqueue serves"]
    assert serving["url"] == server.url
    assert (serving["level"], serving["pid"]) == ("info", server.process.pid)


def test_the_read_pool_s_flag_is_warned_of_once(server_factory: ServerFactory) -> None:
    server = server_factory(max_read_pool_size=4)
    wait_until(lambda: "max_read_pool_size" in server.log(), "the warning")
    assert server.log().count("max_read_pool_size") == 1


def test_settings_come_from_a_file(server_factory: ServerFactory, tmp_path: Path) -> None:
    file = tmp_path / "opsqueue.toml"
    file.write_text('log_format = "json"\n')
    server = server_factory(config=file)
    assert json.loads(server.log().splitlines()[0])
