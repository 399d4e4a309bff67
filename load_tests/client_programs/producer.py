"""A producer of the benchmark: `producer.py ADDRESS STORE_URL COUNT CHUNK_SIZE`; makes operations as they are taken.

Prints the most memory that it used, in bytes, and the seconds from the first operation to the last result.
"""

from __future__ import annotations

import resource
import sys
import time

from opsqueue.producer import ProducerClient


def main() -> None:
    address, store_url, count, chunk_size = sys.argv[1:]
    client = ProducerClient(address, store_url)
    begun = time.perf_counter()
    results = client.run_submission(iter(range(int(count))), chunk_size=int(chunk_size))
    for number, result in enumerate(results):
        if result != number:
            raise SystemExit(f"result {number} is {result}")
    seconds = time.perf_counter() - begun
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, seconds)


if __name__ == "__main__":
    main()
