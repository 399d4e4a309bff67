"""Counts the identifiers of every source file that the queue hands out. Run as many of these as there are cores.

python examples/wordcount_consumer.py localhost:3999 file:///tmp/wordcount-store
"""

import keyword
import sys
import tokenize
from collections import Counter

from opsqueue.consumer import ConsumerClient


def count_identifiers(path: str) -> dict[str, int]:
    """How often each identifier stands in one Python source file."""
    with open(path, "rb") as file:
        names = [token.string for token in tokenize.tokenize(file.readline) if token.type == tokenize.NAME]
    return dict(Counter(name for name in names if not keyword.iskeyword(name)))


if __name__ == "__main__":
    address, store_url = sys.argv[1:]
    # Until Ctrl-C. A file that cannot be read, or is not Python, fails its chunk, and is tried again.
    ConsumerClient(address, store_url).run_each_op(count_identifiers)
