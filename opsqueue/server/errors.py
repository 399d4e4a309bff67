"""The server's start-up errors: a class's docstring is its message and says what to do. Printed once, exit code 1."""

from __future__ import annotations


class StartupError(Exception):
    """The server cannot start: {reason}."""

    def __init__(self, **fields: object) -> None:
        self.fields = fields
        message = " ".join((type(self).__doc__ or "").split())
        super().__init__(message.format(**fields))


class DatabaseInUseError(StartupError):
    """Another opsqueue server (pid {pid}) holds {path}; stop it, or give this one a file of its own with
    --database-filename."""


class ForeignDatabaseError(StartupError):
    """{path} is not an opsqueue database ({what}); it was left untouched, choose another --database-filename."""


class NewerDatabaseError(StartupError):
    """{path} has schema version {found}, this opsqueue knows versions up to {known}; it was left untouched,
    install a newer opsqueue."""


class ReferenceDatabaseError(StartupError):
    """{path} is a database of the reference implementation of opsqueue; it was left untouched,
    choose another --database-filename, and bring its submissions over into that with `opsqueue import`."""


class DamagedDatabaseError(StartupError):
    """{path} is damaged: {what}; restore it from a backup, or move it away to start empty."""


class DatabaseAccessError(StartupError):
    """{path} cannot be opened for writing: {reason}; check the path, its permissions and the free space."""


class BindError(StartupError):
    """Cannot listen on {host}:{port}: {reason}; stop what holds the port, or choose another --port."""
