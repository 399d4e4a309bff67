"""The log: one line an event on standard error, for people, as logfmt, or as JSON. It never stops what it tells of."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import Final, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

_LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_KEY_ORDER: Final = ("timestamp", "level", "part", "pid", "event")


def logger(part: str) -> FilteringBoundLogger:
    """The log of one part of the server: a process or a module."""
    return cast(FilteringBoundLogger, structlog.get_logger(part=part))


def configure(level: str, form: str) -> None:
    """Set the log up for this process and those that it forks. `form`: auto, console, logfmt or json."""
    if form == "auto":
        form = "console" if sys.stderr.isatty() else "logfmt"
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_pid,
            *_renderers(form),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *_: _StandardError(),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=_LEVELS[level], handlers=[_Forwarding()], force=True)


def _renderers(form: str) -> list[Processor]:
    if form == "console":
        colors = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        return [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)]
    if form == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    return [
        structlog.processors.format_exc_info,
        structlog.processors.LogfmtRenderer(key_order=_KEY_ORDER, drop_missing=True, bool_as_flag=False),
    ]


def _add_pid(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    event["pid"] = os.getpid()
    return event


class _StandardError:
    """Where lines go: each in one write, so that those of several processes do not mix."""

    def msg(self, line: str) -> None:
        # A log that nobody reads any more, or a full disk, must not end the server.
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    debug = info = warning = error = critical = exception = log = msg


class _Forwarding(logging.Handler):
    """Takes what libraries say through the standard library's logging."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            logger(record.name).log(record.levelno, record.getMessage(), exc_info=record.exc_info)
        except Exception:
            self.handleError(record)
