"""Why a reference server's database cannot be brought over: a class's docstring is its message. Exit code 1."""

from __future__ import annotations

from opsqueue.server.errors import StartupError


class NoReferenceDatabaseError(StartupError):
    """{path} is not a database of the reference implementation of opsqueue ({what}); nothing was imported,
    name the file that the old server had as --database-filename."""


class ReferenceInUseError(StartupError):
    """{path} is open in another process (pid {pid}); nothing was imported, stop the old server first."""


class ReferenceChangedError(StartupError):
    """{path} was written to while it was read; nothing was imported, stop the old server first and import again."""


class NewerReferenceError(StartupError):
    """{path} was made by a newer reference server: it has migration {found}, which this opsqueue does not know;
    nothing was imported, install a newer opsqueue."""


class OlderReferenceError(StartupError):
    """{path} was made by an older reference server: it lacks migration {missing}; nothing was imported,
    start the reference server 0.30 or newer once with a copy of the file, stop it, and import the copy."""


class DamagedReferenceError(StartupError):
    """{path} is damaged: {what}; nothing was imported, restore the file from a backup."""


class ReferenceAccessError(StartupError):
    """{path} cannot be read: {reason}; nothing was imported."""


class PrefixInUseError(StartupError):
    """Submission {submission} of {path} has the same prefix as submission {other}, which is unfinished in the new
    database: both would do the same work; nothing was imported, let the new one end or cancel it, then import again."""
