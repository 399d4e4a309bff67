"""Submits one operation per source file, waits for the consumers, and adds their results up.

opsqueue serve &
python examples/wordcount_consumer.py localhost:3999 file:///tmp/wordcount-store &
python examples/wordcount_producer.py localhost:3999 file:///tmp/wordcount-store ~/src/project
"""

import sys
from collections import Counter
from pathlib import Path

from opsqueue.producer import ProducerClient


def main() -> None:
    address, store_url, directory = sys.argv[1:]
    files = sorted(str(path) for path in Path(directory).rglob("*.py"))
    client = ProducerClient(address, store_url)
    counts: Counter[str] = Counter()
    # The call returns when all chunks are done; the results come in the order of the files.
    for result in client.run_submission(files, chunk_size=10):
        counts.update(result)
    for name, count in counts.most_common(10):
        print(f"{count:9,} {name}")


if __name__ == "__main__":
    main()
