"""A job that may be started any number of times a day and makes one submission. See docs/guides/idempotency.md.

python examples/one_submission_a_day.py localhost:3999 file:///tmp/daily-store 2026-11-23
"""

import sys
from collections.abc import Iterator

from opsqueue.producer import ProducerClient


def invoices_of(day: str) -> Iterator[str]:
    """What would be a slow query: it is not asked when the submission is there already."""
    print("collecting the invoices of", day)
    yield from (f"{day}/{number}" for number in range(100))


def main() -> None:
    address, store_url, day = sys.argv[1:]
    client = ProducerClient(address, store_url)
    submission = client.find_or_insert(invoices_of(day), chunk_size=10, key=f"invoices-{day}")
    progress = client.progress(submission)
    print(f"submission {submission.id}: {progress.state}, {progress.done} of {progress.total} chunks done")


if __name__ == "__main__":
    main()
