"""A child process of the demo or of `opsqueue map`, which ends with its parent.

`PARENT server FLAGS…` is `opsqueue serve FLAGS…`; `PARENT consumer ADDRESS STORE_URL` counts identifiers until it is
interrupted; `PARENT pool FLAGS…` is `opsqueue consume FLAGS…`.
"""

from __future__ import annotations

import sys

from opsqueue.server.processes import end_with_parent


def main() -> int:
    """Be what the role says; the exit code."""
    parent, role, *words = sys.argv[1:]
    end_with_parent(int(parent))
    if role == "server":
        return _serve(words)
    if role == "pool":
        return _pool(words)
    return _consume(*words)


def _serve(flags: list[str]) -> int:
    from opsqueue.cli.main import main as run_command  # each role imports what it needs, a server nothing of the client

    return run_command(["serve", *flags])


def _consume(address: str, store_url: str) -> int:
    from opsqueue.cli.wordcount import count_identifiers
    from opsqueue.consumer import ConsumerClient

    ConsumerClient(address, store_url).run_each_op(count_identifiers)
    return 0


def _pool(flags: list[str]) -> int:
    from opsqueue.cli.main import main as run_command

    return run_command(["consume", *flags])


if __name__ == "__main__":
    sys.exit(main())
