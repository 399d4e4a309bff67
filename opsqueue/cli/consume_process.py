"""One process of `opsqueue consume`: `python -m opsqueue.cli.consume_process PARENT STATUS_FD CONFIG_JSON`.

Writes what it does as lines of JSON to the status pipe, twice a second. SIGTERM ends it after the chunk in hand, a
second one at once; either way everything else that it holds goes back to the server without a retry.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

from opsqueue.cli import map_function
from opsqueue.cli.functions import LOG_FORMAT, FunctionError, load
from opsqueue.cli.strategies import parse
from opsqueue.client import raw_consumer
from opsqueue.consumer import Chunk, ConsumerClient
from opsqueue.exceptions import IncorrectUsageError, OpsqueueInternalError
from opsqueue.server.exit_codes import ExitCode
from opsqueue.server.processes import end_with_parent

#: Seconds between two lines.
EVERY_S: Final = 0.5


class Interrupted(BaseException):
    """A second signal: whatever is in hand goes back."""


class Status:
    """What this process has done, written to its parent by a thread of its own."""

    def __init__(self, descriptor: int, client: raw_consumer.ConsumerClient) -> None:
        os.set_inheritable(descriptor, False)
        self._pipe = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8")
        self._client = client
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="opsqueue-status", daemon=True)
        self.in_hand = 0

    def start(self) -> None:
        """Begins to write."""
        self._thread.start()

    def end(self) -> None:
        """Writes the last line."""
        self._ended.set()
        self._thread.join()

    def write(self, **fields: object) -> bool:
        """One line; False when the parent is gone."""
        try:
            self._pipe.write(json.dumps(fields) + "\n")
        except OSError:
            return False
        return True

    def _run(self) -> None:
        going = True
        while going:
            going = not self._ended.wait(EVERY_S)
            done, failed = self._client.done, self._client.failed
            if not self.write(done=done, failed=failed, in_hand=self.in_hand, connected=self._client.is_connected):
                return

    def noted(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """`callback`, with the time noted that it runs; what it does is a chunk's failure, never this process's end."""

        def run(*arguments: Any) -> Any:
            self.in_hand = 1
            try:
                return callback(*arguments)
            except SystemExit as error:
                raise RuntimeError(f"the function called sys.exit({error.code!r})") from error
            except (Exception, Interrupted):
                raise
            except BaseException as error:
                # a KeyboardInterrupt is not from the keyboard: SIGINT is ignored here
                raise RuntimeError(f"the function raised {error!r}") from error
            finally:
                self.in_hand = 0

        return run


def main() -> int:
    """Be one process of the pool; the exit code."""
    parent, descriptor, config_text = sys.argv[1:]
    end_with_parent(int(parent))
    config = json.loads(config_text)
    logging.basicConfig(level=config["log_level"], format=LOG_FORMAT)
    try:
        client = ConsumerClient(
            config["server"],
            config["object_store"],
            object_store_options=[(name, value) for name, value in config["object_store_options"]],
        )
        status = Status(int(descriptor), client.inner)
    except IncorrectUsageError as error:
        with os.fdopen(int(descriptor), "w", encoding="utf-8") as pipe:
            pipe.write(json.dumps({"fatal": str(error)}) + "\n")
        return ExitCode.USAGE
    try:
        return _run(client, config, status)
    except (FunctionError, IncorrectUsageError) as error:
        status.write(fatal=str(error))
        return ExitCode.USAGE
    except OpsqueueInternalError as error:
        status.write(fatal=str(error))
        return ExitCode.CANNOT_START


def _run(client: ConsumerClient, config: dict[str, Any], status: Status) -> int:
    function = load(config["function"])
    strategy = parse(config["strategy"])
    signals = 0

    def stop(_number: int, _frame: object) -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            raise Interrupted
        client.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status.write(started=True)
    status.start()
    prefetch = config["prefetch"]
    try:
        if config["per"] == "raw":
            client.run_each_chunk_raw(status.noted(function), strategy=strategy, prefetch=prefetch)
        elif config["per"] == "chunk":
            client.run_each_chunk(status.noted(function), strategy=strategy, prefetch=prefetch)
        else:
            call = map_function.of(function) if config["per"] == "map" else function

            def each(ops: Any, _chunk: Chunk) -> list[Any]:
                return [call(op) for op in ops]

            client.run_each_chunk(status.noted(each), strategy=strategy, prefetch=prefetch)
    except Interrupted:
        return ExitCode.FORCED
    finally:
        status.end()
    return ExitCode.STOPPED


if __name__ == "__main__":
    sys.exit(main())
