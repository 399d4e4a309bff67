"""Where settings come from, which source wins, and how a mistake in each is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from opsqueue.cli import serve
from opsqueue.server.settings import Settings, declarations
from opsqueue.server.settings_sources import LoadedSettings, OneLineParser, SettingsError, load


def loaded(flags: str = "", environment: dict[str, str] | None = None) -> LoadedSettings:
    parser = OneLineParser(prog="opsqueue serve", allow_abbrev=False)
    serve.add_arguments(parser)
    return load(vars(parser.parse_args(flags.split())), environment or {})


def refused(flags: str = "", environment: dict[str, str] | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        loaded(flags, environment)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "opsqueue.toml"


def test_the_reference_s_flags_have_its_defaults() -> None:
    settings = loaded().settings
    assert settings == Settings.defaults()
    assert (settings.port, settings.report_bound_port_pipe, settings.database_filename) == (3999, -1, "opsqueue.db")
    assert (settings.reservation_expiration, settings.heartbeat_interval, settings.max_missable_heartbeats) == (
        600,
        10,
        3,
    )
    assert (settings.max_chunk_retries, settings.max_submission_age, settings.max_submissions_returned) == (
        10,
        3600,
        100_000,
    )


def test_limits_have_the_defaults_that_the_protocol_names() -> None:
    settings = Settings.defaults()
    assert settings.host == "127.0.0.1"
    assert settings.durability == "full"
    assert settings.frontends >= 1
    assert settings.memory_limit >= 2**20
    assert (settings.max_body_size, settings.max_metadata_size, settings.max_direct_content_size) == (
        2**24,
        2**20,
        2**23,
    )
    assert (settings.max_strategic_keys, settings.max_strategic_key_size, settings.max_prefix_size) == (64, 256, 1024)
    assert (settings.max_failure_size, settings.max_chunk_crashes, settings.instance) == (2**16, 0, 0)


def test_flags_win_over_variables_over_the_file_over_defaults(file: Path) -> None:
    file.write_text('port = 1\nmax_chunk_retries = 2\nheartbeat_interval = "3s"\n')
    settings = loaded(f"--config {file} -p 11", {"OPSQUEUE_PORT": "12", "OPSQUEUE_MAX_CHUNK_RETRIES": "22"}).settings
    assert (settings.port, settings.max_chunk_retries, settings.heartbeat_interval) == (11, 22, 3)
    assert settings.max_missable_heartbeats == 3


def test_the_file_can_be_named_by_a_variable_and_the_flag_wins(file: Path, tmp_path: Path) -> None:
    file.write_text("port = 1\n")
    other = tmp_path / "other.toml"
    other.write_text("port = 2\n")
    assert loaded("", {"OPSQUEUE_CONFIG": str(file)}).settings.port == 1
    assert loaded(f"--config {other}", {"OPSQUEUE_CONFIG": str(file)}).settings.port == 2


def test_a_flag_turns_a_switch_of_the_file_off(file: Path) -> None:
    file.write_text("external_checkpoints = true\n")
    assert loaded(f"--config {file}").settings.external_checkpoints is True
    assert loaded(f"--config {file} --no-external-checkpoints").settings.external_checkpoints is False


def test_sizes_in_the_file_are_texts_or_bytes(file: Path) -> None:
    file.write_text('max_body_size = "2 MiB"\nmax_metadata_size = 1000\n')
    settings = loaded(f"--config {file}").settings
    assert (settings.max_body_size, settings.max_metadata_size) == (2 * 2**20, 1000)


@pytest.mark.parametrize("declared", declarations(), ids=lambda declared: declared.name)
def test_every_setting_has_a_flag_a_variable_and_a_key(declared, file: Path) -> None:  # type: ignore[no-untyped-def]
    text = declared.default_text()
    number = text.replace(",", "")
    value = text if declared.is_switch else number if number.lstrip("-").isdigit() else f'"{text}"'
    file.write_text(f"{declared.name} = {value}\n")
    flag = f"--no-{declared.flag[2:]}" if declared.is_switch else f"{declared.flag}={text}".replace(" ", "")
    for found in (loaded(flag), loaded("", {declared.variable: text}), loaded(f"--config {file}")):
        assert found.settings == Settings.defaults()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--port x", "--port: expected a whole number, not 'x'"),
        ("--port 65536", "--port: expected a whole number from 0 to 65,535, not '65536'"),
        ("--port -1", "--port: expected a whole number from 0 to 65,535, not '-1'"),
        ("--heartbeat-interval 0", "--heartbeat-interval: expected a duration of at least 1ms, not '0'"),
        ("--durability maybe", "--durability: expected full or normal, not 'maybe'"),
        ("--instance 1024", "--instance: expected a whole number from 0 to 1,023, not '1024'"),
        ("--max-body-size 3", "--max-body-size: expected a size of at least 1,024 bytes, not '3'"),
        ("--prot 1", "unrecognized arguments: --prot 1; see opsqueue serve --help"),
        ("--port", "argument -p/--port: expected one argument; see opsqueue serve --help"),
        ("--external-checkpoints=1", "argument --external-checkpoints/--no-external-checkpoints: ignored explicit"),
    ],
)
def test_a_bad_flag_is_one_line_that_names_it(flags: str, message: str) -> None:
    assert refused(flags).startswith(message)


def test_a_bad_variable_is_one_line_that_names_it() -> None:
    message = refused("", {"OPSQUEUE_MAX_SUBMISSION_AGE": "an hour"})
    assert message.startswith("environment variable OPSQUEUE_MAX_SUBMISSION_AGE: expected a duration")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot = 1", ": unknown key prot, did you mean port?"),
        ("zzz = 1", ": unknown key zzz"),
        ("max-body-size = 3", ": unknown key max-body-size, did you mean max_body_size?"),
        ('port = "1"', ": port: expected an integer, not a string"),
        ("port = true", ": port: expected an integer, not true or false"),
        ("port = 70000", ": port: expected a whole number from 0 to 65,535, not '70000'"),
        ("heartbeat_interval = 10", ": heartbeat_interval: expected a string, not an integer"),
        ("max_body_size = 1.5", ": max_body_size: expected a string or an integer, not a float"),
        ("host = 2026-01-01", ": host: expected a string, not a date or time"),
        ("[network]\nport = 1", ": unknown key network"),
        ("port = ", ": not valid TOML: "),
        ("config = 'x'", ": unknown key config"),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_and_key(file: Path, content: str, message: str) -> None:
    file.write_text(content)
    assert refused(f"--config {file}").startswith(f"{file}{message}")


def test_a_file_that_is_no_text_is_one_line(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")
    assert refused(f"--config {file}").startswith(f"{file}: not valid TOML: ")


def test_a_file_that_is_missing_is_one_line(tmp_path: Path) -> None:
    assert refused(f"--config {tmp_path}/none.toml") == (
        f"--config: cannot read {tmp_path}/none.toml: No such file or directory"
    )
    assert refused(f"--config {tmp_path}") == f"--config: cannot read {tmp_path}: Is a directory"


def test_the_read_pool_s_flag_is_accepted_with_one_warning() -> None:
    found = loaded("--max-read-pool-size 4")
    assert found.warnings == ("max_read_pool_size is accepted for compatibility and does nothing",)
    assert loaded().warnings == ()


def test_a_variable_that_looks_like_a_slip_is_warned_of_and_a_client_s_is_not() -> None:
    found = loaded("", {"OPSQUEUE_MAX_CHUNK_RETRYS": "3", "OPSQUEUE_URL": "localhost:3999"})
    (warning,) = found.warnings
    assert "OPSQUEUE_MAX_CHUNK_RETRYS is not a setting" in warning
    assert "did you mean OPSQUEUE_MAX_CHUNK_RETRIES?" in warning


def test_a_long_bad_value_does_not_fill_the_screen() -> None:
    assert len(refused("--port " + "9" * 10_000)) < 200
