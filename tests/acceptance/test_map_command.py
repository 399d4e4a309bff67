"""`opsqueue map`: a function over lines or files, through the real command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from opsqueue.producer import ProducerClient
from tests.support.server import Server, wait_until

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(directory: Path, *words: str, given: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "opsqueue", "map", *words],
        input=given, capture_output=True, text=True, timeout=90, cwd=directory, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback (most recent" not in done.stderr or code == 1
    return done


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob(".opsqueue-map*"))


def test_json_lines_come_back_in_order(tmp_path: Path) -> None:
    given = "".join(f"{number}\n" for number in range(500))
    done = run(tmp_path, "tests.support.tasks:double", "--chunk-size", "7", given=given)
    assert done.stdout == "".join(f"{2 * number}\n" for number in range(500))
    assert leftovers(tmp_path) == []


def test_compressed_chunks_come_back_in_order(tmp_path: Path) -> None:
    given = "".join(f"{number}\n" for number in range(50))
    done = run(tmp_path, "tests.support.tasks:double", "--compression", "zstd", given=given)
    assert done.stdout == "".join(f"{2 * number}\n" for number in range(50))


def test_text_lines_come_back_as_text(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a b\n\nü\n")
    run(tmp_path, "tests.support.tasks:shout", "in.txt", "--kind", "text", "--output", "out.txt")
    assert (tmp_path / "out.txt").read_text() == "A B\n\nÜ\n"


def test_the_files_of_a_directory_are_items(tmp_path: Path) -> None:
    files = tmp_path / "files"
    (files / "sub").mkdir(parents=True)
    (files / "a").write_text("1234")
    (files / "sub/b").write_text("12")
    done = run(tmp_path, "tests.support.tasks:size", "files", "--kind", "files")
    assert [json.loads(line) for line in done.stdout.splitlines()] == [["a", 4], ["b", 2]]


def test_nothing_in_gives_nothing_out(tmp_path: Path) -> None:
    assert run(tmp_path, "tests.support.tasks:double").stdout == ""


def test_failures_go_to_their_file_with_their_tracebacks(tmp_path: Path) -> None:
    done = run(tmp_path, "tests.support.tasks:reciprocal", "--errors", "failed.jsonl", given="1\n0\n4\n0\n", code=5)
    assert done.stdout == "1.0\nnull\n0.25\nnull\n"
    failed = [json.loads(line) for line in (tmp_path / "failed.jsonl").read_text().splitlines()]
    assert [line["item"] for line in failed] == [2, 4]
    assert failed[0]["error"] == "ZeroDivisionError: division by zero"
    frames = [line for line in failed[0]["traceback"].splitlines() if line.startswith("  File")]
    assert len(frames) == 1
    assert frames[0].endswith("in reciprocal")
    assert "2 of 4 items failed" in done.stderr


def test_without_a_file_for_failures_the_first_one_ends_it(tmp_path: Path) -> None:
    done = run(tmp_path, "tests.support.tasks:reciprocal", given="1\n0\n4\n", code=1)
    assert "item 2 failed; --errors FILE would go on" in done.stderr
    assert leftovers(tmp_path) == []


def test_a_result_that_is_no_json_is_named_with_its_item(tmp_path: Path) -> None:
    done = run(tmp_path, "tests.support.tasks:unwritable_on_two", given="1\n2\n", code=1)
    (line,) = done.stderr.splitlines()
    assert "item 2: its result cannot be written as JSON: Object of type" in line


@pytest.mark.parametrize(
    ("words", "both"),
    [
        (["in.jsonl", "--output", "in.jsonl"], "the input and the output"),
        (["in.jsonl", "--errors", "link.jsonl"], "the input and --errors"),
        (["in.jsonl", "--output", "new.jsonl", "--errors", "./new.jsonl"], "the output and --errors"),
    ],
)
def test_what_is_to_be_read_is_not_written_over(tmp_path: Path, words: list[str], both: str) -> None:
    (tmp_path / "in.jsonl").write_text("1\n")
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    done = run(tmp_path, "tests.support.tasks:double", *words, code=2)
    assert f"{both} are the same file" in done.stderr
    assert (tmp_path / "in.jsonl").read_text() == "1\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "link.jsonl"]


def test_input_that_the_shell_redirects_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("1\n")
    with open(tmp_path / "in.jsonl", "rb") as given:
        done = subprocess.run(
            [sys.executable, "-m", "opsqueue", "map", "tests.support.tasks:double", "--output", "in.jsonl"],
            stdin=given, capture_output=True, text=True, timeout=90, cwd=tmp_path, env=ENVIRONMENT, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert (tmp_path / "in.jsonl").read_text() == "1\n"


def test_what_a_run_writes_into_a_directory_is_none_of_its_items(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1234")
    words = ["tests.support.tasks:size", ".", "--kind", "files", "--output", "out", "--errors", "failed"]
    for _ in range(2):  # the second time these files are there from the beginning
        run(tmp_path, *words)
        assert (tmp_path / "out").read_text() == '["a",4]\n'


def test_a_reader_that_has_gone_is_said_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(f"{number}\n" for number in range(30_000)))
    words = [sys.executable, "-m", "opsqueue", "map", "tests.support.tasks:double", "in.jsonl", "--chunk-size", "1000"]
    first = subprocess.Popen(
        words, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stderr is not None
    assert first.stdout.readline() == "0\n"
    first.stdout.close()
    said = first.stderr.read()
    assert first.wait(60) == 1
    assert "whoever read the output has gone" in said
    assert "--resume goes on" in said
    assert "Traceback" not in said
    assert run(tmp_path, *words[4:], "--resume").stdout.splitlines()[-1] == "59998"
    assert leftovers(tmp_path) == []


def test_an_interrupted_run_is_resumed_and_does_nothing_twice(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    calls.touch()
    (tmp_path / "in.jsonl").write_text("".join(f"{number}\n" for number in range(300)))
    words = ["tests.support.tasks:slowly", "in.jsonl", "--chunk-size", "1", "--output", "out.jsonl"]
    environment = {**ENVIRONMENT, "OPSQUEUE_TEST_CALLS": str(calls)}
    first = subprocess.Popen(
        [sys.executable, "-m", "opsqueue", "map", *words],
        cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: len(calls.read_text().splitlines()) >= 40, "some are done", within=60)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=30)
    assert first.returncode == 130
    assert "--resume goes on" in said
    assert len(leftovers(tmp_path)) == 1
    before = len(calls.read_text().splitlines())
    assert before < 300
    second = subprocess.run(
        [sys.executable, "-m", "opsqueue", "map", *words, "--resume"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "out.jsonl").read_text() == "".join(f"{-number}\n" for number in range(300))
    # those that were in hand at the interruption are called again, at most what two processes hold
    assert len(calls.read_text().splitlines()) <= 300 + 8
    assert leftovers(tmp_path) == []


def test_a_run_that_was_killed_at_its_insert_does_not_insert_again(
    server: Server, store_url: str, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text("1\n2\n3\n")
    words = ["tests.support.tasks:double", "in.jsonl", "--server", server.address, "--object-store", store_url]
    producer = ProducerClient(server.address, store_url)
    first = subprocess.Popen([sys.executable, "-m", "opsqueue", "map", *words], cwd=tmp_path, env=ENVIRONMENT)
    wait_until(lambda: producer.count_submissions() == 1, "it is inserted", within=60)
    first.kill()
    first.wait(10)
    (home,) = tmp_path.glob(".opsqueue-map*")
    noted = json.loads((home / "map.json").read_text())
    # killed a moment before, it would not have known what became of the insert
    (home / "map.json").write_text(json.dumps({**noted, "submission": None, "items": 0}))
    consumers = subprocess.Popen(
        [sys.executable, "-m", "opsqueue", "consume", words[0], "--per", "map", *words[2:]],
        cwd=ROOT, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        done = run(tmp_path, *words, "--resume")
    finally:
        consumers.terminate()
        consumers.wait(20)
    assert done.stdout == "2\n4\n6\n"
    assert len(producer.list_submissions().submissions) == 1


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"what": 1}', b"\xff"])
def test_a_state_that_cannot_be_read_is_named_and_left(tmp_path: Path, content: bytes) -> None:
    home = tmp_path / "state"
    home.mkdir()
    (home / "map.json").write_bytes(content)
    done = run(tmp_path, "tests.support.tasks:double", "--state", "state", "--resume", code=2)
    assert "was not made by opsqueue map" in done.stderr
    assert (home / "map.json").read_bytes() == content


def test_there_has_to_be_something_to_resume(tmp_path: Path) -> None:
    done = run(tmp_path, "tests.support.tasks:double", "--resume", code=2)
    assert "there is nothing to resume" in done.stderr


def test_a_server_and_its_consumers_do_it_when_asked(server: Server, store_url: str, tmp_path: Path) -> None:
    where = ["--server", server.address, "--object-store", store_url]
    consumers = subprocess.Popen(
        [sys.executable, "-m", "opsqueue", "consume", "tests.support.tasks:reciprocal", "--per", "map", *where],
        cwd=ROOT, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        done = run(tmp_path, "tests.support.tasks:reciprocal", "--errors", "failed", *where, given="2\n0\n", code=5)
    finally:
        consumers.terminate()
        consumers.wait(20)
    assert done.stdout == "0.5\nnull\n"


@pytest.mark.parametrize(
    ("words", "given", "code", "complaint"),
    [
        (["no_such_module:f"], "", 2, "there is no module 'no_such_module'"),
        (["json:dumps", "--kind", "files"], "", 2, "needs a directory"),
        (["json:dumps", "--server", "x:1"], "", 2, "needs --object-store"),
        (["json:dumps", "missing.jsonl"], "", 1, "cannot read missing.jsonl: No such file"),
        (["json:dumps"], '1\n{"a"\n', 1, "standard input, line 2 is no JSON"),
        (["tests.support.tasks:double", "nowhere", "--kind", "files"], "", 1, "nowhere is not a directory"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, words: list[str], given: str, code: int, complaint: str
) -> None:
    done = run(tmp_path, *words, given=given, code=code)
    assert complaint in done.stderr.strip().splitlines()[-1]
    assert leftovers(tmp_path) == []
