"""A consumer process of the demo: `python -m opsqueue.cli.demo_consumer ADDRESS STORE_URL`. Ends with its parent."""

from __future__ import annotations

import sys

from opsqueue.cli.wordcount import count_identifiers
from opsqueue.consumer import ConsumerClient


def main() -> None:
    """Count the identifiers of every file that the queue hands out, until interrupted."""
    address, store_url = sys.argv[1:]
    ConsumerClient(address, store_url).run_each_op(count_identifiers)


if __name__ == "__main__":
    main()
