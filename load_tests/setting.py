"""Under which settings the subjects are measured: how large, where on disk, with which durability."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from load_tests.scale import Scale
from load_tests.server_process import ServerProcess, fresh_directory, running_server


def ignore(_: str) -> None:
    """Say nothing of what is under way."""


@dataclass(frozen=True)
class Bench:
    """How large, where and how durable.

    `homes`: closed after the last subject, it removes what servers of many files left. `directory`: where the databases
    go, None for the system's temporary directory. `say`: told what is under way.
    """

    scale: Scale
    homes: ExitStack
    directory: str | None = None
    durability: str = "full"
    say: Callable[[str], None] = ignore

    def server(self, *flags: str, home: Path | None = None) -> AbstractContextManager[ServerProcess]:
        """A fresh server; `home` as in `running_server`."""
        if "--durability" not in flags:
            flags = ("--durability", self.durability, *flags)
        return running_server(*flags, directory=self.directory, home=home)

    def server_of_many_files(self) -> AbstractContextManager[ServerProcess]:
        """A fresh server whose files stay until all subjects have been measured.

        ext4 without a journal passes over inodes that were freed in the last minutes, one by one, and makes files four
        times as slowly after thousands were removed.
        """
        return self.server(home=self.homes.enter_context(self.home()))

    def home(self) -> AbstractContextManager[Path]:
        """A directory for a database that outlives its server."""
        return fresh_directory(self.directory)
