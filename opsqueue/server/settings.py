"""The server's settings, each declared once: type, default, flag, variable, TOML key, help. Reads no source.

The name of the field makes the names of its sources: `max_body_size` is `--max-body-size`, `OPSQUEUE_MAX_BODY_SIZE`
and the TOML key `max_body_size`. settings_sources.py reads them, settings_doc.py writes docs/configuration.md.
"""

import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Final, Literal, Self

from opsqueue.server import machine, values
from opsqueue.server.values import Kind

VARIABLE_PREFIX: Final = "OPSQUEUE_"

Seconds = float
Bytes = int


@dataclass(frozen=True)
class Setting:
    """What a field's type does not say. `help` is one sentence; `doc` is what only the reference page needs."""

    kind: Kind
    #: In the words of its kind, or computed for this machine (then `default_doc` says how).
    default: str | Callable[[], str]
    help: str
    short: str | None = None
    doc: str = ""
    default_doc: str = ""
    group: str = ""


_network = partial(Setting, group="Network")
_storage = partial(Setting, group="Storage")
_chunks = partial(Setting, group="Chunks and consumers")
_submissions = partial(Setting, group="Submissions")
_limits = partial(Setting, group="Limits on requests")
_process = partial(Setting, group="Processes and logs")


@dataclass(frozen=True)
class Settings:
    """All settings of one server. Times are seconds, sizes are bytes."""

    port: Annotated[
        int,
        _network(
            values.integer(0, 65_535, metavar="PORT"),
            "3999",
            "Listen on this TCP port; 0 picks a free one.",
            short="-p",
        ),
    ]
    host: Annotated[
        str,
        _network(
            values.text("ADDRESS"),
            "127.0.0.1",
            "Listen on this address, or on what this name stands for.",
            doc="`0.0.0.0` listens on every IPv4 address of the machine, `::` on every IPv6 and IPv4 address. "
            "There is no authentication: whoever can connect can insert, cancel and complete.",
        ),
    ]
    report_bound_port_pipe: Annotated[
        int,
        _network(
            values.integer(-1, 2**31 - 1, metavar="FD"),
            "-1",
            "Report the bound port on this inherited file descriptor; -1 does not.",
            doc="When the server serves, it writes the port as 2 bytes, most significant first, and closes the "
            "descriptor. If it cannot start, it closes it without writing.",
        ),
    ]

    database_filename: Annotated[
        str,
        _storage(
            values.text("FILE"),
            "opsqueue.db",
            "Keep the queue in this SQLite file; :memory: keeps it in memory.",
            doc="A path, `:memory:`, or an SQLite URI such as `file::memory:?cache=shared`. The file is created when "
            "it does not exist. A queue in memory is a file in a private directory on `/dev/shm`, removed when the "
            "server ends.",
        ),
    ]
    durability: Annotated[
        Literal["full", "normal"],
        _storage(
            values.choice("full", "normal"),
            "full",
            "What an accepted submission survives: full = loss of power, normal = a crash of the server.",
            doc="`full` waits for the disk before it answers (SQLite's `synchronous=FULL`), `normal` leaves that to "
            "the kernel.",
        ),
    ]
    external_checkpoints: Annotated[
        bool,
        _storage(
            values.switch(),
            "false",
            "Leave checkpoints of the write-ahead log to another program, such as Litestream.",
            doc="The server then never moves the write-ahead log into the database file, and only reports its size "
            "as a metric.",
        ),
    ]

    reservation_expiration: Annotated[
        Seconds,
        _chunks(
            values.duration(above_zero=True),
            "10 minutes",
            "Free a chunk that its consumer has held this long.",
            doc="Counts as one retry of the chunk.",
        ),
    ]
    heartbeat_interval: Annotated[
        Seconds,
        _chunks(values.duration(above_zero=True), "10 seconds", "Ping every consumer this often."),
    ]
    max_missable_heartbeats: Annotated[
        int,
        _chunks(
            values.integer(0, 1_000_000),
            "3",
            "Close a consumer that has missed more heartbeats than this in a row.",
            doc="Its chunks are free for others at once.",
        ),
    ]
    max_chunk_retries: Annotated[
        int,
        _chunks(
            values.integer(0, 2**31 - 1),
            "10",
            "Fail a submission when one of its chunks has failed or expired this often.",
            doc="0 and 1 both mean: at the first failure.",
        ),
    ]
    max_chunk_crashes: Annotated[
        int,
        _chunks(
            values.integer(0, 2**31 - 1),
            "0",
            "Fail a submission when one of its chunks has crashed this many consumers; 0 = no limit.",
            doc="Only consumers that announce their end (the feature `clean-close`) are counted.",
        ),
    ]

    max_submission_age: Annotated[
        Seconds,
        _submissions(
            values.duration(),
            "1 hour",
            "Forget a finished submission this long after its end.",
            doc="Finished means completed, failed or cancelled. Unfinished submissions never expire.",
        ),
    ]
    max_wait: Annotated[
        Seconds,
        _submissions(
            values.duration(),
            "1 minute",
            "Let a request that waits for a submission (?wait=) wait at most this long.",
            doc="A longer wait is cut to this one. 0 answers every request at once; clients then poll.",
        ),
    ]
    max_parked_waits: Annotated[
        int,
        _submissions(
            values.integer(0, 1_000_000),
            "10,000",
            "Refuse to let more requests than this wait in one front-end (503 with Retry-After).",
            doc="A wait holds its connection and some kilobytes of memory.",
        ),
    ]
    max_submissions_returned: Annotated[
        int,
        _submissions(
            values.integer(0, 10_000_000),
            "100,000",
            "Refuse a lookup by strategic metadata that more submissions match.",
        ),
    ]
    memory_limit: Annotated[
        Bytes,
        _submissions(
            values.size(least=2**20),
            lambda: str(machine.memory() // 2),
            "Refuse submissions whose bookkeeping could need more memory than this.",
            doc="A chunk needs at most a quarter of a byte. A submission that can never fit is answered 413, one that "
            "does not fit beside the others now 503 with Retry-After.",
            default_doc="half of the machine's memory",
        ),
    ]
    max_read_pool_size: Annotated[
        int,
        _submissions(
            values.integer(),
            "0",
            "Accepted for compatibility; does nothing.",
            doc="The reference implementation has this flag. Setting it logs one warning.",
        ),
    ]

    max_body_size: Annotated[
        Bytes, _limits(values.size(least=1024), "16 MiB", "Refuse a request whose body is larger (413).")
    ]
    max_metadata_size: Annotated[
        Bytes, _limits(values.size(), "1 MiB", "Refuse a submission whose metadata is larger (422).")
    ]
    max_strategic_keys: Annotated[
        int,
        _limits(values.integer(), "64", "Refuse a submission with more strategic metadata keys (422)."),
    ]
    max_strategic_key_size: Annotated[
        Bytes,
        _limits(values.size(), "256", "Refuse a submission with a longer strategic metadata key (422)."),
    ]
    max_prefix_size: Annotated[
        Bytes, _limits(values.size(least=1), "1 KiB", "Refuse a submission with a longer object store prefix (422).")
    ]
    max_direct_content_size: Annotated[
        Bytes,
        _limits(
            values.size(),
            "8 MiB",
            "Refuse a submission with a larger content of one chunk in the request itself (422).",
        ),
    ]
    max_failure_size: Annotated[
        Bytes, _limits(values.size(), "64 KiB", "Cut the text of a chunk's failure after this many bytes.")
    ]

    frontends: Annotated[
        int,
        _process(
            values.integer(1, 256),
            lambda: str(max(1, machine.cores() - 1)),
            "Serve connections with this many processes.",
            default_doc="the number of cores minus 1, at least 1",
        ),
    ]
    instance: Annotated[
        int,
        _process(
            values.integer(0, 1023),
            "0",
            "Make submission ids with this number in them, so that those of several servers differ.",
        ),
    ]
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        _process(values.choice("debug", "info", "warning", "error"), "info", "Log events of this level and above."),
    ]
    log_format: Annotated[
        Literal["auto", "console", "logfmt", "json"],
        _process(
            values.choice("auto", "console", "logfmt", "json"),
            "auto",
            "Write the log, on standard error, in this form.",
            doc="`auto` is `console` on a terminal and `logfmt` otherwise.",
        ),
    ]

    @classmethod
    def defaults(cls) -> Self:
        """What a server without flags, variables and file has; change it with dataclasses.replace."""
        return cls.of({})

    @classmethod
    def of(cls, given: dict[str, object]) -> Self:
        """Parsed values by name, the defaults for all others."""
        made = {declared.name: declared.default() for declared in declarations() if declared.name not in given}
        return cls(**given, **made)  # type: ignore[arg-type]  # each value came out of its own setting's parser


@dataclass(frozen=True)
class Declared:
    """A setting with its names."""

    name: str
    setting: Setting

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return VARIABLE_PREFIX + self.name.upper()

    @property
    def is_switch(self) -> bool:
        return bool in self.setting.kind.toml

    def default_text(self) -> str:
        """The default as its kind writes it, for this machine."""
        default = self.setting.default
        return default if isinstance(default, str) else default()

    def default(self) -> object:
        return self.setting.kind.parse(self.default_text())


@cache
def declarations() -> tuple[Declared, ...]:
    """Every setting, in the order of declaration."""
    return tuple(_declared())


def _declared() -> Iterator[Declared]:
    for name, hint in typing.get_type_hints(Settings, include_extras=True).items():
        yield Declared(name, next(extra for extra in hint.__metadata__ if isinstance(extra, Setting)))
