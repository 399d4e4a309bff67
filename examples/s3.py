"""A producer and a consumer that meet in an S3 bucket, with timeouts and retries. See docs/guides/s3.md.

export AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=… AWS_REGION=eu-west-1
python examples/s3.py consume localhost:3999 s3://bucket/opsqueue &
python examples/s3.py produce localhost:3999 s3://bucket/opsqueue
"""

import sys

from opsqueue.consumer import ConsumerClient
from opsqueue.producer import ProducerClient

#: Beside what the environment says; the names are obstore's.
OPTIONS = [("timeout", "30 seconds"), ("connect_timeout", "5 seconds"), ("max_retries", "5")]


def reverse(text: str) -> str:
    """The operation."""
    return text[::-1]


def main() -> None:
    command, address, store_url = sys.argv[1:]
    if command == "consume":
        ConsumerClient(address, store_url, object_store_options=OPTIONS).run_each_op(reverse)
    else:
        client = ProducerClient(address, store_url, object_store_options=OPTIONS)
        for result in client.run_submission(["desserts", "stressed", "opsqueue"], chunk_size=2):
            print(result)


if __name__ == "__main__":
    main()
