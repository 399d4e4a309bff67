"""`opsqueue map` when functions, items and neighbours misbehave."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.test_map_command import ENVIRONMENT, leftovers, run
from tests.support.permissions import bound_by_permissions
from tests.support.server import wait_until


@pytest.mark.parametrize(
    ("function", "told"),
    [("exits_on_two", "SystemExit: 3"), ("unwritable_on_two", "not JSON serializable")],
)
def test_an_item_that_cannot_be_done_is_one_failure_among_results(tmp_path: Path, function: str, told: str) -> None:
    done = run(tmp_path, f"tests.support.tasks:{function}", "--errors", "failed", given="1\n2\n3\n", code=5)
    assert done.stdout == "1\nnull\n3\n"
    [failed] = [json.loads(line) for line in (tmp_path / "failed").read_text().splitlines()]
    assert failed["item"] == 2
    assert told in failed["error"]


def test_an_item_that_kills_its_process_every_time_ends_the_run_and_does_not_hang(tmp_path: Path) -> None:
    done = run(tmp_path, "tests.support.tasks:dies_on_two", "--chunk-size", "1", given="1\n2\n3\n", code=1)
    assert "were lost while they worked on this chunk" in done.stderr
    assert leftovers(tmp_path) == []


def test_a_process_that_dies_once_is_replaced(tmp_path: Path) -> None:
    given = json.dumps(str(tmp_path / "marker")) + "\n"
    assert run(tmp_path, "tests.support.tasks:die_once", given=given).stdout == '"alive"\n'


def test_integers_of_any_size_stay_what_they_are(tmp_path: Path) -> None:
    large = 2**64 + 1
    assert run(tmp_path, "tests.support.tasks:double", given=f"{large}\n").stdout == f"{2 * large}\n"


def test_a_text_of_several_lines_is_a_failure_not_two_results(tmp_path: Path) -> None:
    given = "'one'\n'two\\nlines'\n'three'\n"
    done = run(tmp_path, "builtins:eval", "--kind", "text", "--errors", "failed", given=given, code=5)
    assert done.stdout == "one\nnull\nthree\n"
    assert "several lines" in (tmp_path / "failed").read_text()


def test_a_folder_that_cannot_be_read_is_named_instead_of_passed_over(tmp_path: Path) -> None:
    (tmp_path / "files" / "closed").mkdir(parents=True)
    (tmp_path / "files" / "closed").chmod(0)
    words = [sys.executable, "-m", "opsqueue", "map", "tests.support.tasks:size", "files", "--kind", "files"]
    done = subprocess.run(
        [*bound_by_permissions(), *words],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    (tmp_path / "files" / "closed").chmod(0o755)
    assert done.returncode == 1
    assert done.stderr == "opsqueue: map: cannot read files/closed: Permission denied\n"
    assert leftovers(tmp_path) == []


def test_a_second_run_in_the_same_place_leaves_the_first_one_alone(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    marker.touch()
    words = [sys.executable, "-m", "opsqueue", "map", "tests.support.tasks:until_removed"]
    first = subprocess.Popen(
        words, cwd=tmp_path, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdin is not None
        first.stdin.write(json.dumps(str(marker)) + "\n")
        first.stdin.close()
        first.stdin = None
        wait_until(Path(f"{marker}.begun").exists, "the first one works", within=30)
        done = run(tmp_path, "tests.support.tasks:until_removed", given="1\n", code=2)
        assert "another run is using" in done.stderr
        assert "--state" in done.stderr
    finally:
        marker.unlink()
    output, _ = first.communicate(timeout=60)
    assert (first.returncode, output) == (0, '"done"\n')
    assert leftovers(tmp_path) == []


def test_an_unfinished_run_is_neither_forgotten_nor_in_the_way(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    marker.touch()
    (tmp_path / "in").write_text(json.dumps(str(marker)) + "\n")
    words = ["tests.support.tasks:until_removed", "in"]
    first = subprocess.Popen([sys.executable, "-m", "opsqueue", "map", *words], cwd=tmp_path, env=ENVIRONMENT)
    wait_until(Path(f"{marker}.begun").exists, "it works", within=30)
    first.send_signal(signal.SIGKILL)
    first.wait(10)
    marker.unlink()
    refused = run(tmp_path, *words, code=2)
    assert "--resume goes on" in refused.stderr
    assert "--restart throws" in refused.stderr
    assert run(tmp_path, *words, "--restart").stdout == '"done"\n'
    assert leftovers(tmp_path) == []
