"""The exit codes of the command line; docs/configuration.md lists them."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the end of `opsqueue` says."""

    #: Stopped as asked: SIGTERM, SIGINT or SIGHUP; `opsqueue import`: imported.
    STOPPED = 0
    #: The server could not start, or its writer could not; the last line on standard error says why.
    #: `opsqueue import`: nothing was imported.
    CANNOT_START = 1
    #: A flag, a variable or the file is wrong; the line on standard error says which.
    USAGE = 2
    #: Stopped at once, by a second signal while it was stopping.
    FORCED = 3
    #: `opsqueue consume`: no connection to the server within --connect-timeout; `opsqueue gc`: no connection.
    NOT_CONNECTED = 4
    #: `opsqueue map`: everything is done, but some items failed, which --errors has.
    SOME_FAILED = 5
    #: Interrupted from the keyboard (128 + SIGINT, as shells have it), where there was nothing to stop in order.
    INTERRUPTED = 130
