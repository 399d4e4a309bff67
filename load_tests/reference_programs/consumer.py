"""Reference client: a consumer whose operation returns its input. Arguments: address, store URL[, strategy]."""

import sys

from opsqueue.consumer import ConsumerClient, Strategy

STRATEGIES = {
    "Oldest": Strategy.Oldest(),
    "Newest": Strategy.Newest(),
    "Random": Strategy.Random(),
    "PreferDistinct": Strategy.PreferDistinct(meta_key="company", underlying=Strategy.Oldest()),
}

client = ConsumerClient(sys.argv[1], sys.argv[2])
print("ready", flush=True)
if len(sys.argv) > 3:
    client.run_each_op(lambda operation: operation, strategy=STRATEGIES[sys.argv[3]])
else:
    client.run_each_op(lambda operation: operation)
