"""Reference client: submits N operations, checks the results. Arguments: address, store URL, N, chunk size."""

import sys
import time

from opsqueue.producer import ProducerClient

address, store, operations, chunk_size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
client = ProducerClient(address, store)
begun = time.perf_counter()
results = list(client.run_submission(range(operations), chunk_size=chunk_size))
seconds = time.perf_counter() - begun
if results != list(range(operations)):
    sys.exit(f"the results differ: {results[:10]}...")
print(f"seconds {seconds}")
