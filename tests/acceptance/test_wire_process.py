"""WIRE sections 1 and 2 over raw sockets: the process, its command line, its port, and how it stops."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.acceptance.conftest import Serve, Wire
from tests.conftest import ServerFactory
from tests.support.raw_consumer import CLOSE, RawConsumer
from tests.support.raw_producer import RawProducer
from tests.support.server import OPSQUEUE, Server, wait_until

#: The promise; what a busy test machine takes longer is not the server's.
STOPS_WITHIN_S = 1.0


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*OPSQUEUE, *arguments], capture_output=True, text=True, timeout=60)


# --- one port ---


def test_one_port_serves_producers_consumers_and_plain_endpoints(wire: Wire) -> None:
    assert wire.producer.ask("GET", "/ping") == (200, b"pong")
    status, version = wire.producer.ask("GET", "/version")
    assert status == 200
    assert version.startswith(b"v")
    assert version.count(b".") == 2
    assert wire.producer.ask("GET", "/producer/version") == (200, version)
    assert wire.producer.ask("GET", "/producer/submissions/count") == (200, b"0")
    assert wire.producer.metric("consumers_connected_count") == 0
    assert wire.consumer().init["version_info"] == version.decode()
    assert wire.producer.metric("consumers_connected_count") == 1


def test_it_listens_on_127_0_0_1_unless_told(server_factory: ServerFactory) -> None:
    assert _listening_addresses(server_factory()) == {"127.0.0.1"}
    assert _listening_addresses(server_factory(host="0.0.0.0")) == {"0.0.0.0"}


def _listening_addresses(server: Server) -> set[str]:
    """From the kernel's table: addresses in its byte order, ports, and state 0A = listening."""
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, state = line.split()[1], line.split()[3]
        address, port = local.split(":")
        if state == "0A" and int(port, 16) == server.port:
            found.add(socket.inet_ntoa(int(address, 16).to_bytes(4, sys.byteorder)))
    return found


# --- flags ---


def test_every_flag_of_the_reference_has_its_default() -> None:
    shown = " ".join(command("--help").stdout.partition("examples:")[0].split())
    for flag, default in {
        "--port": "3999",
        "--report-bound-port-pipe": "-1",
        "--database-filename": "opsqueue.db",
        "--reservation-expiration": "10 minutes",
        "--heartbeat-interval": "10 seconds",
        "--max-missable-heartbeats": "3",
        "--max-chunk-retries": "10",
        "--max-submission-age": "1 hour",
        "--max-submissions-returned": "100,000",
    }.items():
        described = shown.rpartition(f" {flag} ")[2]
        assert f"(default: {default})" in described.partition(" --")[0], flag
    assert "--max-read-pool-size" in shown


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--heartbeat-interval", "0"),
        ("--heartbeat-interval", "0 seconds"),
        ("--heartbeat-interval", "soon"),
        ("--reservation-expiration", "-1s"),
        ("--port", "65536"),
        ("--max-chunk-retries", "-1"),
        ("--max-missable-heartbeats", "many"),
    ],
)
def test_a_bad_value_is_refused_with_one_line_that_names_the_flag(flag: str, value: str) -> None:
    result = command(f"{flag}={value}")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert flag in result.stderr


@pytest.mark.parametrize(
    ("text", "secs", "nanos"),
    [("1h 30m", 5400, 0), ("500ms", 0, 500_000_000), ("10 minutes", 600, 0), ("2days 1us", 172_800, 1000)],
)
def test_durations_are_human_text(serve: Serve, text: str, secs: int, nanos: int) -> None:
    assert serve(heartbeat_interval=text).consumer().init["heartbeat_interval"] == {"secs": secs, "nanos": nanos}


@pytest.mark.parametrize("name", [":memory:", "file::memory:?cache=shared"])
def test_a_database_in_memory_serves_survives_its_writer_and_leaves_no_file(
    server_factory: ServerFactory, name: str
) -> None:
    server = server_factory(database_filename=name)
    with RawProducer(server.port) as producer:
        submission = producer.insert(2)
        with RawConsumer(server.port) as consumer:
            server.kill_child("writer")
            assert consumer.end()[0] == 1012, "one that connects before the front-end knows would be sent away, too"
        with RawConsumer(server.port) as consumer:
            consumer.complete(*consumer.reserve_ids(2))
            consumer.settle()
            assert producer.state(submission) == "Completed"
    assert not server.database.exists()
    assert not (server.directory / name).exists()


def test_a_database_given_as_a_uri_is_that_file(server_factory: ServerFactory, tmp_path: Path) -> None:
    server_factory(database_filename=f"file:{tmp_path}/queue%20one.db")
    assert (tmp_path / "queue one.db").exists()


# --- the port's pipe ---


def test_the_port_is_reported_as_2_bytes_big_endian_and_the_pipe_closed(tmp_path: Path) -> None:
    server = Server(tmp_path, {})
    reading = server.launch()
    try:
        reported = b""
        while part := os.read(reading, 16):
            reported += part
        # The end of the pipe: no process of the server has kept it open.
        assert len(reported) == 2
        with socket.create_connection(("127.0.0.1", int.from_bytes(reported, "big"))):
            pass
    finally:
        os.close(reading)
        server.close()


def test_a_bind_that_fails_is_retried_and_then_one_line_a_closed_pipe_and_an_exit_code(
    server: Server, tmp_path: Path
) -> None:
    second = Server(tmp_path, {"port": server.port})
    begun = time.monotonic()
    reading = second.launch()
    try:
        assert os.read(reading, 16) == b""
        assert second.process.wait(20) != 0
    finally:
        os.close(reading)
        second.close()
    assert 1.2 < time.monotonic() - begun < 10
    assert len(second.log().splitlines()) == 1
    assert str(server.port) in second.log()
    assert server.answers()


def test_a_port_that_its_predecessor_still_closes_is_taken_over(server: Server, tmp_path: Path) -> None:
    second = Server(tmp_path, {"port": server.port})
    reading = second.launch()
    try:
        lock = second.database.with_name(f"{second.database.name}-lock")
        wait_until(lock.exists, "it has its lock and tries the port")
        stopper = threading.Thread(target=server.stop)
        stopper.start()
        assert int.from_bytes(os.read(reading, 2), "big") == server.port
        stopper.join()
        second.port = server.port
        assert second.answers()
    finally:
        os.close(reading)
        second.close()


# --- stopping ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_stop_closes_everything_within_a_second_whoever_holds_chunks_or_keeps_connections_open(
    server_factory: ServerFactory, number: int
) -> None:
    server = server_factory(frontends=2)
    with ExitStack() as stack:
        producer = stack.enter_context(RawProducer(server.port))
        submission = producer.insert(100)
        consumers = [stack.enter_context(RawConsumer(server.port)) for _ in range(8)]
        for consumer in consumers[:4]:
            consumer.reserve(5)
        for consumer in consumers[4:]:
            consumer.complete(*consumer.reserve_ids(5))
            consumer.ask(0)
        # Two front-ends: what one was told may reach the writer after what the other is asked.
        wait_until(lambda: producer.chunks_done(submission) == 20, "all reports have arrived")
        # Connections that never say a word, or half of one.
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(4)]
        idle[0].sendall(b"GET /pi")
        idle[1].sendall(b"POST /producer/submissions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert server.stop(number) < STOPS_WITHIN_S
        assert server.process.returncode == 0
        for consumer in consumers:
            # Nobody answers the close frame; the end of the connection comes all the same.
            assert consumer.end()[0] == 1001
    server.restart()
    with RawProducer(server.port) as producer:
        assert producer.chunks_done(submission) == 20


def test_a_consumer_that_does_not_read_does_not_hold_up_a_stop(server_factory: ServerFactory) -> None:
    server = server_factory()
    with RawProducer(server.port) as producer, RawConsumer(server.port, receive_buffer=65536) as stuck:
        producer.insert(50, metadata=[0] * (1 << 20))
        stuck.say(*[{"WantToReserveChunks": {"max": 1, "strategy": "Oldest"}}] * 50)
        producer.wait_for_metric("opsqueue_chunks_reserved", 50)
        assert server.stop() < STOPS_WITHIN_S


def test_a_request_that_was_accepted_is_finished_or_answered_503_and_never_reset(server_factory: ServerFactory) -> None:
    server = server_factory()
    answers: list[tuple[int, int | None]] = []
    errors: list[BaseException] = []
    begun = threading.Barrier(9)

    def insert_until_told_to_stop(producer: RawProducer) -> None:
        begun.wait()
        while True:
            body = {"chunk_contents": {"SeeObjectStorage": {"prefix": os.urandom(8).hex(), "count": 1}}}
            try:
                status, answer = producer.ask("POST", "/producer/submissions", body)
            except OSError as error:
                # A new connection finds nobody. One that was open is closed with an answer.
                errors.append(error)
                return
            answers.append((status, int(answer) if status == 200 else None))
            if status != 200:
                return

    threads = [threading.Thread(target=insert_until_told_to_stop, args=(RawProducer(server.port),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    begun.wait()
    wait_until(lambda: len(answers) > 50, "inserts are under way")
    server.stop()
    for thread in threads:
        thread.join()
    assert {status for status, _ in answers} <= {200, 503}
    assert all(isinstance(error, ConnectionRefusedError) for error in errors), errors
    server.restart()
    with RawProducer(server.port) as producer:
        # What was acknowledged is there.
        _, count = producer.ask("GET", "/producer/submissions/count")
        assert int(count) >= sum(status == 200 for status, _ in answers)
        for _, submission in answers:
            assert submission is None or producer.state(submission) == "InProgress"


def test_what_a_consumer_said_right_before_the_stop_is_kept(server_factory: ServerFactory) -> None:
    server = server_factory()
    with RawProducer(server.port) as producer, RawConsumer(server.port) as consumer:
        submission = producer.insert(1000)
        consumer.complete(*consumer.reserve_ids(1000))
        consumer.settle()
        server.stop()
    server.restart()
    with RawProducer(server.port) as producer:
        assert producer.state(submission) == "Completed"


def test_the_close_frame_comes_before_the_end_of_the_connection(server: Server) -> None:
    with RawConsumer(server.port) as consumer:
        assert server.stop() < STOPS_WITHIN_S
        while (got := consumer.next_frame()).opcode != CLOSE:
            pass
        assert int.from_bytes(got.payload[:2], "big") == 1001
        assert got.payload[2:].decode()
        assert consumer.socket.recv(1) == b""


# --- several front-ends ---


def test_two_front_ends_serve_one_queue(serve: Serve) -> None:
    wire = serve(frontends=2)
    consumers = [wire.consumer() for _ in range(8)]
    submission = wire.producer.insert(80)
    for consumer in consumers:
        consumer.complete(*consumer.reserve_ids(10))
        consumer.settle()
    wire.producer.wait_for_state(submission, "Completed")
    _, metrics = wire.producer.ask("GET", "/metrics")
    shares = [
        float(line.rpartition(b" ")[2])
        for line in metrics.splitlines()
        if line.startswith(b"opsqueue_consumers_connected{")
    ]
    assert sum(shares) == 8
    # Spread within two of each other, whatever else is connected.
    assert len(shares) == 2
    assert min(shares) >= 2


def test_a_second_server_on_the_same_database_is_refused_in_one_line(server: Server) -> None:
    result = command("--port", "0", "--database-filename", str(server.database))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert str(server.database) in result.stderr
    assert server.answers()


def test_a_second_server_with_a_database_of_its_own_takes_another_port(
    server: Server, server_factory: ServerFactory
) -> None:
    other = server_factory()
    assert other.port != server.port
    with RawProducer(server.port) as first, RawProducer(other.port) as second:
        first.insert(1)
        assert second.ask("GET", "/producer/submissions/count") == (200, b"0")
