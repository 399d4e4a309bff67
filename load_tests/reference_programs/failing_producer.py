"""Reference client: submits an operation that fails, prints what it is told. Arguments: address, store URL."""

import sys

from opsqueue.exceptions import SubmissionFailedError
from opsqueue.producer import ProducerClient

client = ProducerClient(sys.argv[1], sys.argv[2])
try:
    print("results", list(client.run_submission([1, 2, -3, 4], chunk_size=1)))
except SubmissionFailedError as error:
    print("failed:", error.failure.strip().splitlines()[-1])
