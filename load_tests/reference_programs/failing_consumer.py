"""Reference client: a consumer whose operation raises for negative numbers. Arguments: address, store URL."""

import sys

from opsqueue.consumer import ConsumerClient


def operation(number):
    if number < 0:
        raise ValueError(f"cannot do {number}")
    return number


client = ConsumerClient(sys.argv[1], sys.argv[2])
print("ready", flush=True)
client.run_each_op(operation)
