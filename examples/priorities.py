"""Urgent work first, and no customer before another. See docs/guides/priorities.md.

python examples/priorities.py consumer localhost:3999 file:///tmp/priorities-store
python examples/priorities.py producer localhost:3999 file:///tmp/priorities-store
"""

import sys

from opsqueue.consumer import ConsumerClient, Strategy
from opsqueue.producer import ProducerClient

#: Urgent submissions first; when there are none, the customer with the fewest chunks in work.
STRATEGY = Strategy.OrElse(
    first=Strategy.SelectOnly(meta_key="urgent", value=1, underlying=Strategy.Oldest()),
    second=Strategy.PreferDistinct(meta_key="customer", underlying=Strategy.Oldest()),
)


def work(text: str) -> str:
    """The order in which the consumer's lines come is the point."""
    print(text, flush=True)
    return text


def main() -> None:
    role, address, store_url = sys.argv[1:]
    if role == "consumer":
        ConsumerClient(address, store_url).run_each_op(work, strategy=STRATEGY, prefetch=0)
        return
    client = ProducerClient(address, store_url)
    metadata = {
        "large": {"customer": 1},
        "small": {"customer": 2},
        "urgent": {"customer": 1, "urgent": 1},
    }
    submissions = [
        client.insert_submission([f"{name} {n}" for n in range(3)], chunk_size=1, strategic_metadata=pairs)
        for name, pairs in metadata.items()
    ]
    for submission in submissions:
        client.wait(submission)
    print("all done")


if __name__ == "__main__":
    main()
