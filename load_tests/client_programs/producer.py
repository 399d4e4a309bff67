"""A producer of the benchmark: `producer.py ADDRESS STORE_URL COUNT CHUNK_SIZE`; makes operations as they are taken.

Prints the most memory that it used, in bytes, and the seconds from the first operation to the last result.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

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
    # not ru_maxrss, which begins with what the process that started this one had
    [peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    print(int(peak.split()[1]) * 1024, seconds)


if __name__ == "__main__":
    main()
