"""Producer and consumer on one event loop. See docs/guides/coroutines.md.

python examples/coroutines.py localhost:3999 file:///tmp/coroutines-store
"""

import asyncio
import sys

from opsqueue.consumer import AsyncConsumerClient
from opsqueue.producer import AsyncProducerClient


async def request(number: int) -> int:
    """Stands for a request that takes a while: sixteen chunks are in hand at a time, on one thread."""
    await asyncio.sleep(0.01)
    return number * number


async def main() -> None:
    address, store_url = sys.argv[1:]
    async with (
        AsyncConsumerClient(address, store_url) as consumer,
        AsyncProducerClient(address, store_url) as producer,
    ):
        consuming = asyncio.create_task(consumer.run_each_op(request, concurrency=16))
        results = await producer.run_submission(range(1_000), chunk_size=10)
        print("sum of squares:", sum([result async for result in results]))
        consumer.stop()
        await consuming


if __name__ == "__main__":
    asyncio.run(main())
