"""The supervisor with real forks; its children are a few lines each (tests/support/small_server.py)."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.server import Server, is_running, wait_until

Launch = Callable[..., Server]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Makes a server that misbehaves as `orders` say; starts it if asked to."""
    with ExitStack() as stack:

        def launch(
            orders: str = "none", *, start: bool = True, environment: dict[str, str] | None = None, **settings: object
        ) -> Server:
            command = [sys.executable, "-m", "tests.support.small_server", orders]
            server = Server(tmp_path, settings, command, environment)
            stack.callback(server.close)
            return server.start() if start else server

        yield launch


def ask(server: Server) -> tuple[int, int]:
    """The index and pid of the front-end that answers."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        index, pid = connection.makefile().read().split()
    return int(index), int(pid)


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def all_pids(server: Server) -> list[int]:
    return [pid for pids in server.pids().values() for pid in pids]


def test_the_port_is_reported_when_every_process_serves(launch: Launch) -> None:
    server = launch(frontends=3)
    assert len(server.pids()["writer"]) == 1
    assert len(server.pids()["frontend"]) == 3
    assert ask(server)[1] in server.pids()["frontend"]
    assert f"url=http://127.0.0.1:{server.port}" in server.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_signal_ends_every_process_and_frees_the_port_within_a_second(launch: Launch, number: int) -> None:
    server = launch(frontends=2)
    pids = all_pids(server)
    assert server.stop(number) < 1.0
    assert server.process.returncode == 0
    assert not any(map(is_running, pids))
    assert is_refused(server.port)


def test_children_ignore_the_stop_signals_that_reach_the_whole_group(launch: Launch) -> None:
    server = launch(frontends=2)
    pids = all_pids(server)
    for pid in pids:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert ask(server)[1] in pids
    assert all_pids(server) == pids


def test_children_that_do_not_stop_are_killed_in_time(launch: Launch) -> None:
    server = launch("frontend-ignores-drain,writer-ignores-stop", frontends=2)
    pids = all_pids(server)
    assert server.stop() < 1.2
    assert server.process.returncode == 0
    assert not any(map(is_running, pids))


def test_a_second_signal_stops_at_once(launch: Launch) -> None:
    server = launch("frontend-ignores-drain,writer-ignores-stop")
    pids = all_pids(server)
    server.process.terminate()
    wait_until(lambda: "event=stopping" in server.log(), "the stop has begun")
    assert server.stop() < 0.4
    assert server.process.returncode == 3
    assert not any(map(is_running, pids))


@pytest.mark.parametrize("role", ["writer", "frontend"])
def test_a_killed_child_is_replaced_at_once(launch: Launch, role: str) -> None:
    server = launch(frontends=2)
    others = [pid for pid in all_pids(server) if pid != server.pids()[role][0]]
    begun = time.monotonic()
    killed = server.kill_child(role)
    server.wait_for_replacement(role, killed)
    assert time.monotonic() - begun < 1.0
    assert set(others) < set(all_pids(server))
    assert ask(server)[1] in server.pids()["frontend"]
    assert "end=SIGKILL" in server.log()


def test_a_front_end_that_hangs_is_killed_and_replaced(launch: Launch) -> None:
    server = launch("frontend-hangs")
    hanging = server.pids()["frontend"][0]
    server.wait_for_replacement("frontend", hanging)
    assert "a process hangs" in server.log()


def test_a_front_end_that_keeps_dying_is_tried_again_ever_more_slowly(launch: Launch) -> None:
    server = launch("frontend-crashes", start=False)
    os.close(server.launch())
    wait_until(lambda: "delay=0.4" in server.log(), "the fourth try is put off")
    assert [f"delay={delay}" in server.log() for delay in (0.0, 0.1, 0.2)] == [True] * 3
    assert server.stop() < 1.0
    assert server.process.returncode == 0


def test_a_killed_supervisor_takes_all_along_within_a_second_and_frees_the_port(launch: Launch) -> None:
    server = launch(frontends=2)
    pids = all_pids(server)
    begun = time.monotonic()
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not any(map(is_running, pids)), "the children are gone", within=1.0)
    assert time.monotonic() - begun < 1.0
    assert is_refused(server.port)


def test_a_writer_that_refuses_to_start_ends_the_server_with_its_one_line(launch: Launch) -> None:
    server = launch("writer-refuses", start=False)
    report = server.launch()
    assert os.read(report, 2) == b""
    os.close(report)
    assert server.process.wait(10) == 1
    assert server.log() == "opsqueue: the writer refuses\n"


def test_a_writer_that_crashes_three_times_before_it_serves_ends_the_server(launch: Launch) -> None:
    server = launch("writer-crashes", start=False)
    os.close(server.launch())
    assert server.process.wait(10) == 1
    assert server.log().count("a process died") == 2
    assert "the writer cannot start" in server.log().splitlines()[-1]


def test_a_second_server_on_the_same_database_is_refused_with_one_line(launch: Launch, tmp_path: Path) -> None:
    first = launch()
    (tmp_path / "second").mkdir()
    second = Server(
        tmp_path / "second",
        {"database_filename": first.database},
        [sys.executable, "-m", "tests.support.small_server", "none"],
    )
    os.close(second.launch())
    assert second.process.wait(10) == 1
    assert len(second.log().splitlines()) == 1
    assert str(first.database) in second.log()
    assert ask(first)


def test_a_port_that_is_taken_is_one_line_and_no_report(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = launch(start=False, port=taken.getsockname()[1])
        report = server.launch()
        assert os.read(report, 2) == b""
        os.close(report)
        assert server.process.wait(10) == 1
    assert server.log().splitlines() == [
        f"opsqueue: Cannot listen on 127.0.0.1:{server.settings['port']}: Address already in use; "
        "stop what holds the port, or choose another --port."
    ]


def test_a_port_that_becomes_free_while_it_is_tried_is_taken(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = launch(start=False, port=taken.getsockname()[1])
        report = server.launch()
        lock = server.database.with_name("opsqueue.db-lock")
        wait_until(lock.exists, "the server has its lock and tries the port")
    reported = os.read(report, 2)
    os.close(report)
    assert int.from_bytes(reported, "big") == server.settings["port"]


def test_an_address_that_does_not_exist_is_one_line(launch: Launch) -> None:
    server = launch(start=False, host="no-such-host.invalid")
    os.close(server.launch())
    assert server.process.wait(30) == 1
    assert len(server.log().splitlines()) == 1
    assert "no-such-host.invalid" in server.log()


def test_a_report_on_a_descriptor_that_is_not_open_is_refused(launch: Launch) -> None:
    server = launch(start=False)
    # The helper always passes a pipe of its own; the last flag counts, and is wrong.
    server.command = ["/bin/sh", "-c", 'exec "$@" --report-bound-port-pipe 77', "sh", *server.command]
    os.close(server.launch())
    assert server.process.wait(10) == 1
    assert "--report-bound-port-pipe 77 is not an open file descriptor" in server.log()


def test_a_database_in_memory_is_gone_at_the_end(launch: Launch) -> None:
    before = set(Path("/dev/shm").glob("opsqueue-memory-*"))
    server = launch(database_filename=":memory:")
    (directory,) = set(Path("/dev/shm").glob("opsqueue-memory-*")) - before
    assert directory.stat().st_mode & 0o777 == 0o700
    server.stop()
    assert not directory.exists()


def test_a_database_in_memory_whose_server_was_killed_is_removed_by_the_next_one(launch: Launch) -> None:
    before = set(Path("/dev/shm").glob("opsqueue-memory-*"))
    server = launch(database_filename="file::memory:?cache=shared")
    (directory,) = set(Path("/dev/shm").glob("opsqueue-memory-*")) - before
    server.kill()
    assert directory.exists()
    server.start()
    assert not directory.exists()


def test_systemd_is_told_of_the_start_the_watchdog_and_the_stop(launch: Launch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(10)
        manager.bind(str(tmp_path / "notify"))
        server = launch(environment={"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"})
        told = {manager.recv(4096).split(b"\n")[0] for _ in range(3)}
        assert told == {b"READY=1", b"WATCHDOG=1"}
        server.process.terminate()
        while (last := manager.recv(4096).split(b"\n")[0]) == b"WATCHDOG=1":
            continue
        assert last == b"STOPPING=1"
