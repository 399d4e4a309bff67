"""Every program in examples/ does what its guide says."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opsqueue.client.store import open_store
from opsqueue.common import DEFAULT_SERIALIZATION_FORMAT as cbor2
from opsqueue.common import encode_chunk
from opsqueue.producer import ProducerClient
from tests.conftest import ServerFactory
from tests.support import emulators
from tests.support.consumer_threads import consuming, of_each_op
from tests.support.reference_database import Old, ReferenceDatabase, old_id
from tests.support.server import Server, wait_until

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def run(program: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / program), *words],
        capture_output=True, text=True, timeout=100, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def pool(server: Server, store_url: str, function: str) -> Iterator[None]:
    """`opsqueue consume`, as the examples' first lines have it."""
    words = [function, "--object-store", store_url, "--server", server.address, "--processes", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "opsqueue", "consume", *words], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


def test_compress_directory(server: Server, store_url: str, tmp_path: Path) -> None:
    files = tmp_path / "files"
    for number in range(30):
        path = files / str(number % 3) / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("the same again " * number)
    with pool(server, store_url, "examples.compress_directory:compress"):
        said = run("compress_directory.py", server.address, store_url, str(files), str(tmp_path / "out"))
    assert said.startswith("30 files, ")
    for number in range(30):
        with gzip.open(tmp_path / "out" / str(number % 3) / f"{number}.txt.gz", "rt") as file:
            assert file.read() == "the same again " * number


def test_one_submission_a_day(server: Server, store_url: str) -> None:
    first = run("one_submission_a_day.py", server.address, store_url, "2026-11-23")
    second = run("one_submission_a_day.py", server.address, store_url, "2026-11-23")
    assert first == "collecting the invoices of 2026-11-23\n" + second
    assert "InProgress, 0 of 10 chunks done" in second


def test_retries(server_factory: ServerFactory, store_url: str) -> None:
    server = server_factory(max_chunk_retries=100)
    with pool(server, store_url, "examples.retries:fetch"):
        said = run("retries.py", server.address, store_url).splitlines()
    assert said[0] == "['INDEX', 'ABOUT', 'NEWS']"
    assert said[1] == "failed: 'forbidden': the key was refused"
    assert said[2].startswith("again as submission ")


def test_priorities(server: Server, store_url: str) -> None:
    command = [sys.executable, str(ROOT / "examples/priorities.py")]
    producer = subprocess.Popen(
        [*command, "producer", server.address, store_url], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    client = ProducerClient(server.address, store_url)
    wait_until(lambda: client.count_submissions() == 3, "all submissions wait")
    consumer = subprocess.Popen(
        [*command, "consumer", server.address, store_url], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    try:
        said, _ = producer.communicate(timeout=60)
        assert said == "all done\n"
        consumer.terminate()
        order, _ = consumer.communicate(timeout=20)
    finally:
        consumer.kill()
        producer.kill()
    assert order.splitlines()[:3] == ["urgent 0", "urgent 1", "urgent 2"]
    assert sorted(order.splitlines()[3:]) == [f"{name} {number}" for name in ("large", "small") for number in range(3)]


def test_large_results(server: Server, store_url: str, tmp_path: Path) -> None:
    with pool(server, store_url, "examples.large_results:blow_up"):
        run("large_results.py", server.address, store_url, str(tmp_path / "result.txt"))
    with (tmp_path / "result.txt").open() as lines:
        assert [int(line[:7]) for line in lines] == list(range(2_000))


def test_coroutines(server: Server, store_url: str) -> None:
    expected = sum(number * number for number in range(1_000))
    assert run("coroutines.py", server.address, store_url) == f"sum of squares: {expected}\n"


def test_tracing(server: Server, store_url: str) -> None:
    lines = run("tracing.py", server.address, store_url).splitlines()
    assert "[1, 2, 3]" in lines
    spans = [line.split(" ", 1) for line in lines if line != "[1, 2, 3]"]
    (job,) = [trace for trace, name in spans if name == "nightly job"]
    assert [trace for trace, name in spans if name == "run_chunk"] == [job] * 3


def test_after_an_import(server_factory: ServerFactory, store_url: str, tmp_path: Path) -> None:
    old = ReferenceDatabase(tmp_path / "old.db")
    submissions = [Old(old_id(60), 3, "first", done={1: None}), Old(old_id(50), 1, "second")]
    for submission in submissions:
        old.add(submission)
        assert submission.prefix is not None
        for chunk in range(submission.count):
            open_store(store_url).put(f"{submission.prefix}/{chunk}-in.bin", encode_chunk([chunk], cbor2))
    old.close()
    words = ["import", str(old.path), "--database-filename", str(tmp_path / "new.db")]
    subprocess.run([sys.executable, "-m", "opsqueue", *words], check=True, capture_output=True, timeout=60)
    server = server_factory(database_filename=tmp_path / "new.db")
    words = [str(ROOT / "examples/after_an_import.py"), server.address]
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as program:
        assert program.stdout is not None
        first, second = (submission.id for submission in submissions)
        assert program.stdout.readline() == f"submission {first}: InProgress, 1 of 3 chunks done\n"
        assert program.stdout.readline() == f"submission {second}: InProgress, 0 of 1 chunks done\n"
        with consuming(server, store_url, of_each_op(lambda operation: operation)):
            rest, _ = program.communicate(timeout=60)
    assert rest.splitlines() == [
        f"submission {first}: Completed, 3 of 3 chunks done", f"submission {second}: Completed, 1 of 1 chunks done",
    ]  # fmt: skip


def test_every_example_is_tested_and_has_its_guide() -> None:
    tested = Path(__file__).read_text() + (ROOT / "tests/acceptance/test_demo.py").read_text()
    docs = ROOT / "docs"
    of_guides = [docs / "tutorial.md", docs / "upgrading.md", *(docs / "guides").glob("*.md")]
    guides = "".join(path.read_text() for path in of_guides)
    for program in (ROOT / "examples").glob("*.py"):
        if program.name != "__init__.py":
            assert program.name in tested
            if not program.name.startswith("wordcount"):
                assert f"examples/{program.name}" in guides


def test_s3(server: Server, tmp_path: Path) -> None:
    with emulators.s3(tmp_path) as (store_url, options):
        environment = ENVIRONMENT | {f"AWS_{name.upper()}": value for name, value in options}
        words = [sys.executable, str(ROOT / "examples" / "s3.py")]
        consumer = subprocess.Popen([*words, "consume", server.address, store_url], env=environment)
        try:
            done = subprocess.run(
                [*words, "produce", server.address, store_url],
                capture_output=True, text=True, timeout=100, env=environment, check=False,
            )  # fmt: skip
        finally:
            consumer.kill()
            consumer.wait(10)
    assert (done.returncode, done.stdout) == (0, "stressed\ndesserts\neueuqspo\n"), done.stderr
