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
    """`directory`: where the databases go, None for the system's temporary directory; `say`: told what is under way."""

    scale: Scale
    directory: str | None = None
    durability: str = "full"
    say: Callable[[str], None] = ignore

    def server(self, *flags: str, home: Path | None = None) -> AbstractContextManager[ServerProcess]:
        """A fresh server; `home` as in `running_server`."""
        if "--durability" not in flags:
            flags = ("--durability", self.durability, *flags)
        return running_server(*flags, directory=self.directory, home=home)

    def server_kept_in(self, homes: ExitStack) -> AbstractContextManager[ServerProcess]:
        """A fresh server whose files stay until `homes` ends.

        For rounds that make thousands of files: ext4 without a journal passes over inodes that were freed in the last
        minute, one by one, and makes files four times as slowly after many were removed.
        """
        return self.server(home=homes.enter_context(self.home()))

    def home(self) -> AbstractContextManager[Path]:
        """A directory for a database that outlives its server."""
        return fresh_directory(self.directory)
