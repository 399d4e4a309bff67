"""Operations that fail now and then, must wait, or can never succeed. See docs/guides/retries.md.

opsqueue consume examples.retries:fetch --object-store file:///tmp/retries-store &
python examples/retries.py localhost:3999 file:///tmp/retries-store
"""

import random
import sys

from opsqueue.consumer import FailSubmission, RetryLater, chunk_context
from opsqueue.producer import ProducerClient, SubmissionFailedError


def fetch(page: str) -> str:
    """Stands for a request to somebody else's server."""
    if page == "forbidden":
        # no retry would help: the submission ends now, with this text
        raise FailSubmission(f"{page!r}: the key was refused")
    chance = random.random()
    if chance < 0.2:
        # a plain exception: one of the chunk's retries (10 unless the server is told otherwise)
        raise ConnectionError(f"{page!r}: try {chunk_context().chunk.retries + 1} was cut off")
    if chance < 0.4:
        # asked to slow down: the chunk is handed out again after that time, and no retry counts
        raise RetryLater(0.05)
    return page.upper()


def main() -> None:
    client = ProducerClient(*sys.argv[1:])
    print(list(client.run_submission(["index", "about", "news"], chunk_size=1)))
    try:
        client.run_submission(["index", "forbidden"], chunk_size=1)
    except SubmissionFailedError as error:
        print("failed:", error.failure)
        # when the cause is mended: the same submission again, without the chunks that were done
        print("again as submission", client.retry_submission(error.submission.id).id)


if __name__ == "__main__":
    main()
