"""The tutorial, the README's programs and the guides, done literally: what a newcomer types is typed here."""

from __future__ import annotations

import ast
import asyncio
import functools
import inspect
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import opsqueue.consumer
import opsqueue.producer
from opsqueue.cli import strategies
from opsqueue.consumer import ConsumerClient, Strategy
from opsqueue.producer import ProducerClient
from tests.support.consumer_threads import consuming, of_each_op
from tests.support.server import Server, wait_until

ROOT = Path(__file__).resolve().parents[2]
GUIDES = {path.stem: path.read_text() for path in (ROOT / "docs" / "guides").glob("*.md")}
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
README = (ROOT / "README.md").read_text()


def blocks(page: str) -> list[tuple[str, str]]:
    """The blocks of code of a page: (language, text)."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


class Newcomer:
    """A directory like the repository's, a home, and `opsqueue` and `python` on the path; one queue."""

    def __init__(self, directory: Path, port: int) -> None:
        self.home = directory / "home"
        self.here = directory / "here"
        self.here.mkdir(parents=True)
        self.home.mkdir()
        (self.here / "examples").symlink_to(ROOT / "examples")
        installed = directory / "installed"
        installed.mkdir()
        (installed / "opsqueue").symlink_to(ROOT / "opsqueue")
        commands = directory / "bin"
        commands.mkdir()
        main = f"#!{sys.executable}\nimport sys\nfrom opsqueue.cli.main import main\nsys.exit(main())\n"
        for name, script in {"opsqueue": main, "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n'}.items():
            (commands / name).write_text(script)
            (commands / name).chmod(0o755)
        self._port = port
        self._stores = directory / "stores"
        self._environment = {
            **os.environ,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "PYTHONPATH": str(installed),
            "HOME": str(self.home),
            # the pages' port may be taken, and their places in /tmp another's: nothing else is changed
            "OPSQUEUE_PORT": str(port),
            "OPSQUEUE_SERVER": f"localhost:{port}",
        }
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._log = directory / "log"

    def moved(self, text: str) -> str:
        return text.replace("localhost:3999", f"localhost:{self._port}").replace("/tmp/", f"{self._stores}/")

    def write(self, program: str) -> None:
        """Keeps a block that begins with its file's name."""
        name = re.match(r"# (\w+\.py)\n", program)
        assert name is not None, program
        (self.here / name[1]).write_text(self.moved(program))

    def start(self, command: str) -> None:
        """Something that goes on running; the one of the same name is ended by Ctrl-C before."""
        name = " ".join(command.split()[:2])
        self.interrupt(name)
        with self._log.open("ab") as log:
            self._running[name] = subprocess.Popen(
                self.moved(command), shell=True, cwd=self.here, env=self._environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def interrupt(self, name: str) -> None:
        process = self._running.pop(name, None)
        if process is not None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(30)

    def run(self, command: str) -> str:
        done = subprocess.run(
            self.moved(command), shell=True, cwd=self.here, env=self._environment, capture_output=True, text=True,
            timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr}\n{self.log()}"
        return done.stdout

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def close(self) -> None:
        for name in list(self._running)[::-1]:
            self.interrupt(name)


@pytest.fixture
def newcomer(tmp_path: Path, unused_tcp_port: int) -> Iterator[Newcomer]:
    made = Newcomer(tmp_path, unused_tcp_port)
    try:
        yield made
    finally:
        made.close()


def without_numbers(text: str) -> str:
    return re.sub(r"\d[\d,]*", "N", text)


def matches(shown: str, said: str) -> bool:
    """Whether a line is as the page shows it; … stands for anything, and a number for any other."""
    parts = [re.escape(part.strip()) for part in without_numbers(shown).split("…")]
    return re.search(".*".join(parts), without_numbers(said)) is not None


def test_the_tutorial_works_as_it_is_written(newcomer: Newcomer) -> None:
    for number in range(20):
        photo = newcomer.home / "photos" / f"{number}.raw"
        photo.parent.mkdir(exist_ok=True)
        photo.write_bytes(bytes(10_000))
    done = 0
    for language, text in blocks(TUTORIAL):
        if language == "python":
            if text.startswith("# "):
                newcomer.write(text)
            else:
                assert text in (ROOT / "examples" / "compress_directory.py").read_text()
            continue
        assert language == "console"
        command, *shown = text.splitlines()
        assert command.startswith("$ ")
        # the bar is there on a terminal only
        shown = [line for line in shown if "━" not in line]
        if command.split()[1:3] in (["opsqueue", "serve"], ["opsqueue", "consume"]):
            newcomer.start(command[2:])
            for line in shown:
                wait_until(lambda line=line: any(matches(line, said) for said in newcomer.log().splitlines()), line, 30)
        else:
            said = newcomer.run(command[2:]).splitlines()
            assert len(said) == len(shown)
            assert all(map(matches, shown, said)), said
        done += 1
    assert done == 5
    assert said == ["333328333350000"]
    assert len(list((newcomer.home / "photos.gz").rglob("*.gz"))) == 20
    assert (newcomer.here / "opsqueue.db").exists()


def test_the_readmes_producer_and_consumer_work_as_they_are_written(newcomer: Newcomer) -> None:
    programs = [text for language, text in blocks(README) if language == "python"]
    for program in programs:
        newcomer.write(program)
    newcomer.start("opsqueue serve")
    newcomer.start("python consumer.py")
    expected = sum(number * number for number in range(100_000))
    assert newcomer.run("python producer.py") == f"sum of squares: {expected}\n"


# --- the guides: each block of Python against a real server, with what it leaves open ---


class Guide:
    """Runs the blocks of one guide, with the names that its reader has."""

    def __init__(self, name: str, server: Server, **names: Any) -> None:
        self._blocks = [text for language, text in blocks(GUIDES[name]) if language == "python"]
        self._server = server
        self.names = {**vars(opsqueue.producer), **vars(opsqueue.consumer), **names}
        for lazy in ("AsyncProducerClient", "AsyncConsumerClient"):
            self.names[lazy] = getattr(opsqueue.producer if "Producer" in lazy else opsqueue.consumer, lazy)

    @property
    def count(self) -> int:
        return len(self._blocks)

    def run(self, number: int = 0) -> None:
        text = self._blocks[number].replace("localhost:3999", self._server.address)
        code = compile(text, "guide", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        outcome = eval(code, self.names)  # a coroutine where the block awaits
        if inspect.iscoroutine(outcome):
            asyncio.run(outcome)


def test_every_guide_with_python_is_run_here() -> None:
    ours = Path(__file__).read_text()
    for name, text in GUIDES.items():
        if "```python" in text:
            assert f'Guide("{name}"' in ours


def test_coroutines(server: Server, store_url: str) -> None:
    ProducerClient(server.address, store_url).insert_submission(range(40), chunk_size=10)
    fetched: list[int] = []

    async def fetch(number: int) -> int:
        fetched.append(number)
        if len(fetched) == 40:
            guide.names["client"].stop()
        return number

    guide = Guide("coroutines", server, store=store_url, fetch=fetch)
    guide.run()
    assert sorted(fetched) == list(range(40))


def test_idempotency(server: Server, store_url: str) -> None:
    asked = []

    def operations() -> Iterator[int]:
        asked.append(True)
        yield from range(30)

    client = ProducerClient(server.address, store_url)
    guide = Guide("idempotency", server, client=client, operations=operations)
    guide.run()
    first = guide.names["submission"]
    guide.run()
    assert guide.names["submission"] == first
    assert len(asked) == 1


def test_large_results(server: Server, store_url: str) -> None:
    written: list[int] = []
    client = ProducerClient(server.address, store_url)
    guide = Guide("large-results", server, client=client, operations=range(500), write=written.extend)
    with consuming(server, store_url, of_each_op(lambda number: number + 1)):
        guide.run()
    assert written == list(range(1, 501))


def test_priorities(server: Server, store_url: str) -> None:
    worked: list[int] = []

    def work(number: int) -> int:
        worked.append(number)
        if len(worked) == 100:
            consumer.stop()
        return number

    producer, consumer = ProducerClient(server.address, store_url), ConsumerClient(server.address, store_url)
    Guide("priorities", server, producer=producer, consumer=consumer, operations=range(100), work=work).run()
    assert sorted(worked) == list(range(100))


def test_every_strategy_of_the_guide_can_be_made() -> None:
    text = GUIDES["priorities"]
    shown = re.findall(r"^\| [^|]+ \| `([^`]+)`", text, flags=re.MULTILINE)
    assert len(shown) == 7
    names = {name: getattr(Strategy, name) for name in vars(Strategy) if name[0].isupper()}
    for strategy in shown:
        whole = strategy.replace("SelectOnly(…)", 'SelectOnly(meta_key="kind", value=1, underlying=Oldest())')
        assert isinstance(eval(whole, names), Strategy)
    for given in re.findall(r'--strategy "([^"]+)"', text):
        assert isinstance(strategies.parse(given), Strategy)


def test_retries(server: Server, store_url: str) -> None:
    client = ProducerClient(server.address, store_url)
    looks = threading.Event()
    given: list[Any] = []

    def steps(_parameters: int) -> Iterator[Any]:
        while True:
            looks.set()
            yield lambda: threading.Event().wait(0.005)  # the work of one step

    guide = Guide("retries", server, steps=steps)
    guide.run()

    def simulate(parameters: int) -> None:
        given.append(guide.names["simulate"](parameters))

    submission = client.insert_submission([1], chunk_size=1)
    with consuming(server, store_url, of_each_op(simulate)):
        assert looks.wait(20)
        client.cancel_submission(submission)
        wait_until(lambda: given == [None], "the operation stops early", 20)


def test_s3(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    guide = Guide("s3", server, address=server.address)
    guide.run()
    assert isinstance(guide.names["client"], ProducerClient)
    assert isinstance(guide.names["consumer"], ConsumerClient)


@functools.cache
def help_of(command: str) -> str:
    words = [sys.executable, "-m", "opsqueue", command, "--help"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


def test_every_flag_of_a_command_in_the_guides_is_in_its_help() -> None:
    commands = set()
    for text in (TUTORIAL, README, *GUIDES.values()):
        lines = re.findall(r"`(opsqueue [a-z][^`\n]+)`", text)
        lines += re.findall(r"^(?:\$ )?(opsqueue [a-z].*)$", text, flags=re.MULTILINE)
        for line in lines:
            for flag in re.findall(r"(?<!\S)--[a-z-]+", line):
                command = line.split()[1]
                assert flag in help_of(command), line
                commands.add(command)
    assert {"consume", "gc", "map"} <= commands
