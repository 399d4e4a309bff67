"""The pages for people say what the code has: links, messages, codes, log lines, and programs that work."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import apsw
import cbor2
import pytest

from opsqueue._speedups import compact
from opsqueue._speedups import consumer as speedups
from opsqueue.cli.main import COMMANDS
from opsqueue.protocol import consumer as protocol
from opsqueue.protocol import strategy
from opsqueue.server import metrics
from opsqueue.server.exit_codes import ExitCode
from opsqueue.server.processes import EXIT_UNHANDLED
from opsqueue.server.settings import declarations

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
UPGRADING = (ROOT / "docs" / "upgrading.md").read_text()


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Headings as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- links ---


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{name_of(page)} links to {target}, which has no such heading"


# --- docs/protocol.md ---


def test_every_message_of_the_protocol_is_described() -> None:
    client = [message.__name__ for message in typing.get_args(protocol.ClientContents)]
    server = [message.__name__ for message in typing.get_args(protocol.ServerMessage)]
    assert len(client) >= 8
    assert len(server) >= 5
    for name in client:
        assert f"| `{name}`" in PROTOCOL, name
    for name in server:
        assert f'"{name}"' in PROTOCOL, name


def test_every_field_of_every_message_is_described() -> None:
    described = {
        protocol.Chunk: protocol.Chunk.__struct_fields__,
        protocol.Submission: protocol.Submission.__struct_fields__,
        **{message: message.__struct_fields__ for message in typing.get_args(protocol.ClientContents)},
    }
    for message, fields in described.items():
        for field in fields:
            assert f"`{field}`" in PROTOCOL, f"{message.__name__}.{field}"
    init = protocol.encode_server(protocol.Init(1, 1, "v", "id", protocol.FEATURES, 1))
    for field in cbor2.loads(init)["Init"]:
        assert f"| `{field}` |" in PROTOCOL, field


def test_every_feature_is_described_with_its_messages() -> None:
    for feature in protocol.FEATURES:
        assert f"| `{feature}` |" in PROTOCOL
        assert f"*(feature {feature})*" in PROTOCOL


def test_every_reason_of_a_dropped_chunk_is_described() -> None:
    for reason in typing.get_args(protocol.DropReason):
        assert f"`{reason}`" in PROTOCOL


def test_every_strategy_is_described() -> None:
    for name in ("Oldest", "Newest", "Random"):
        assert f"\n| {name} |" in PROTOCOL
        assert strategy.parse(name)
    assert "\n| PreferDistinct(k, u) |" in PROTOCOL


def test_limits_are_those_of_the_code() -> None:
    assert speedups.LARGEST_FRAME == 16 * 1024 * 1024
    assert "a frame above 16 MiB" in PROTOCOL
    assert speedups.LARGEST_MESSAGE == 64 * 1024 * 1024
    assert "a message above 64 MiB" in PROTOCOL
    assert f"{speedups.PARKED_LIMIT:,} unanswered requests, for {speedups.ASKED_LIMIT:,} chunks" in PROTOCOL
    assert f"{compact.CREDITS_LIMIT} credits open, and {compact.CREDIT_LIMIT:,} chunks in each" in PROTOCOL
    assert f"at most {compact.CREDIT_WINDOW:,} chunks of a credit" in PROTOCOL
    assert f"keep the {compact.REMEMBERED_DESCRIPTIONS} submissions" in PROTOCOL
    assert re.search(rf"A message may\s+name {compact.REPORT_LIMIT:,} chunks", PROTOCOL)
    assert f"more than {strategy.MAX_DEPTH} deep" in PROTOCOL
    assert f"`meta_key` of more than {strategy.MAX_META_KEY_BYTES} bytes" in PROTOCOL
    assert f"payload `{protocol.HEARTBEAT.hex(' ')}`" in PROTOCOL


def test_every_close_code_is_described() -> None:
    frames = (ROOT / "opsqueue" / "_speedups" / "frames.pxd").read_text()
    codes = set(re.findall(r"CLOSE_(?!NO_CODE)\w+ = (\d{4})", frames))
    assert len(codes) >= 8
    for code in codes:
        assert f"\n| {code} |" in PROTOCOL


def test_the_bytes_of_the_exchange_are_the_captured_ones() -> None:
    files = [ROOT / "tests" / "vectors" / name for name in ("websocket.jsonl", "compact.jsonl")]
    vectors = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    captured = {vector["name"]: vector["hex"] for vector in vectors}
    shown = re.findall(r"^```cbor (\w+)\n(.*?)^```", PROTOCOL, flags=re.MULTILINE | re.DOTALL)
    assert len(shown) == 5
    for name, block in shown:
        lines = (line.partition("|")[0] for line in block.splitlines())
        assert "".join(lines).replace(" ", "") == captured[name], name


# --- docs/operations.md ---


def test_every_exit_code_is_explained() -> None:
    for code in ExitCode:
        assert f"\n| {int(code)} |" in OPERATIONS
    assert f"{EXIT_UNHANDLED} is an exception" in OPERATIONS


def test_every_warning_and_error_of_the_server_is_explained() -> None:
    said = set()
    for source in (ROOT / "opsqueue" / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("warning", "error", "exception")
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "log"
                and isinstance(node.args[0], ast.Constant)
            ):
                said.add(node.args[0].value)
    assert len(said) >= 15
    for line in said:
        assert f"| `{line}` |" in OPERATIONS, line


def test_metrics_that_are_named_exist() -> None:
    known = {metric.name for metric in metrics.METRICS}
    known |= {"opsqueue_process_up"}
    named = set(re.findall(r"`(opsqueue_\w+)`", OPERATIONS + PROTOCOL))
    assert len(named) >= 15
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert {name for name in named if name not in known and f"`{name}`" not in page} == set()


@pytest.fixture(scope="module")
def flags_of_commands() -> set[str]:
    """What every command's --help tells."""
    commands = re.findall(r"^  ([a-z]+)  ", COMMANDS, re.MULTILINE)
    assert len(commands) >= 4
    found = {"--version"}
    for command in commands:
        words = [sys.executable, "-m", "opsqueue", command, "--help"]
        told = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout
        found.update(re.findall(r"--[a-z][a-z-]+", told))
    return found


@pytest.mark.parametrize("page", [path for path in PAGES if path.name != "configuration.md"], ids=name_of)
def test_flags_that_are_named_exist(page: Path, flags_of_commands: set[str]) -> None:
    known = {declared.flag for declared in declarations()} | flags_of_commands
    for flag in re.findall(r"`(--[a-z][a-z-]+)", without_code(page.read_text())):
        assert flag in known, f"{name_of(page)} names {flag}"


def test_the_backup_program_copies_a_database_in_use(tmp_path: Path) -> None:
    program = next(block for block in blocks(OPERATIONS, "python") if "backup.py" in block)
    live = tmp_path / "live.db"
    writing = apsw.Connection(str(live))
    writing.pragma("journal_mode", "WAL")
    writing.execute("CREATE TABLE t(x); INSERT INTO t VALUES (1), (2)")
    copy = tmp_path / "copy.db"
    script = tmp_path / "backup.py"
    script.write_text(program)
    subprocess.run([sys.executable, script, live, copy], check=True, timeout=60)
    writing.execute("INSERT INTO t VALUES (3)")
    assert apsw.Connection(str(copy)).execute("SELECT count(*) FROM t").get == 2
    assert not (tmp_path / "copy.db-wal").exists()


# --- docs/upgrading.md, README.md ---


def test_every_flag_of_the_reference_is_listed() -> None:
    for flag in (
        "--port",
        "--report-bound-port-pipe",
        "--database-filename",
        "--reservation-expiration",
        "--heartbeat-interval",
        "--max-missable-heartbeats",
        "--max-chunk-retries",
        "--max-submission-age",
        "--max-submissions-returned",
        "--max-read-pool-size",
    ):
        assert f"`{flag}`" in UPGRADING


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_in_the_pages_compiles(page: Path) -> None:
    for block in blocks(page.read_text(), "python"):
        compile(block, name_of(page), "exec")


def test_the_readme_shows_a_producer_and_a_consumer() -> None:
    shown = "".join(blocks((ROOT / "README.md").read_text(), "python"))
    assert "ProducerClient(" in shown
    assert "ConsumerClient(" in shown
