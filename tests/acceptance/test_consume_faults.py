"""`opsqueue consume` when functions misbehave, and when its surroundings do."""

from __future__ import annotations

from pathlib import Path

import pytest

from opsqueue.exceptions import SubmissionFailedError
from opsqueue.producer import ProducerClient
from tests.acceptance.test_consume_command import pool, run
from tests.conftest import ServerFactory
from tests.support.server import Server, is_running, wait_until


def test_a_function_that_calls_exit_fails_its_chunk_and_its_process_goes_on(
    server_factory: ServerFactory, store_url: str, tmp_path: Path
) -> None:
    server = server_factory(max_chunk_retries=2)
    producer = ProducerClient(server.address, store_url)
    with pool(tmp_path, server, store_url, "tests.support.tasks:exits", "--processes", "1") as running:
        with pytest.raises(SubmissionFailedError, match=r"called sys\.exit\(7\)"):
            producer.run_submission([7], chunk_size=1)
        assert "replaced" not in running.log


@pytest.mark.parametrize("raised", ["KeyboardInterrupt", "CancelledError"])
def test_whatever_a_function_raises_fails_its_chunk_and_its_process_goes_on(
    server_factory: ServerFactory, store_url: str, tmp_path: Path, raised: str
) -> None:
    server = server_factory(max_chunk_retries=2)
    producer = ProducerClient(server.address, store_url)
    with pool(tmp_path, server, store_url, "tests.support.tasks:interrupts", "--processes", "1") as running:
        with pytest.raises(SubmissionFailedError, match=rf"the function raised {raised}\(\)"):
            producer.run_submission([raised], chunk_size=1)
        assert "replaced" not in running.log


def test_a_process_that_died_is_replaced_and_a_child_of_it_does_not_keep_its_chunk(
    server: Server, store_url: str, tmp_path: Path
) -> None:
    producer = ProducerClient(server.address, store_url)
    marker = tmp_path / "marker"
    with pool(tmp_path, server, store_url, "tests.support.tasks:leaves_a_child", "--processes", "1") as running:
        [pid] = producer.run_submission([str(marker)], chunk_size=1)
        assert running.children() == [pid]
        assert "was killed by signal 9" in running.log
        assert not is_running(int(marker.read_text()))
        running.process.terminate()
        assert running.process.wait(20) == 0


def test_a_second_signal_ends_those_who_do_not_hear_it_too(server: Server, store_url: str, tmp_path: Path) -> None:
    producer = ProducerClient(server.address, store_url)
    with pool(tmp_path, server, store_url, "tests.support.tasks:deaf", "--processes", "1") as running:
        producer.insert_submission([str(tmp_path / "deaf")], chunk_size=1)
        wait_until((tmp_path / "deaf").exists, "it hears nothing any more", within=30)
        running.process.terminate()
        wait_until(lambda: "ending after the chunks in hand" in running.log, "it is stopping")
        running.process.terminate()
        assert running.process.wait(20) == 3
        assert "are killed" in running.log


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--prefetch", "-1"], "--prefetch"),
        (["--prefetch", "many"], "--prefetch"),
        (["--health-file", "/nowhere/at/all"], "--health-file /nowhere/at/all cannot be written"),
    ],
)
def test_a_flag_that_cannot_work_is_one_line_before_any_process(words: list[str], told: str) -> None:
    result = run("json:loads", "--object-store", "file:///tmp/none", *words)
    assert result.returncode == 2
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_health_file_that_can_no_longer_be_written_stops_nobody(
    server: Server, store_url: str, tmp_path: Path
) -> None:
    producer = ProducerClient(server.address, store_url)
    directory = tmp_path / "health"
    directory.mkdir()
    words = ["tests.support.tasks:pid", "--processes", "1", "--health-file", str(directory / "file")]
    with pool(tmp_path, server, store_url, *words) as running:
        wait_until((directory / "file").exists, "it is healthy", within=30)
        (directory / "file").unlink()
        directory.rmdir()
        wait_until(lambda: "cannot be written" in running.log, "it says so")
        assert len(list(producer.run_submission(range(5), chunk_size=1))) == 5
        assert running.process.poll() is None
