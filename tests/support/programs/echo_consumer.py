"""A consumer whose operation returns its input. Arguments: address, store URL."""

import sys

from opsqueue.consumer import ConsumerClient

client = ConsumerClient(sys.argv[1], sys.argv[2])
print("ready", flush=True)
client.run_each_op(lambda operation: operation)
