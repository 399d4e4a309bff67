"""Says what an old server had not finished, waits for it, and says what became of it. See docs/upgrading.md.

opsqueue import OLD.db --database-filename opsqueue.db
opsqueue serve & opsqueue consume module:function --object-store file:///srv/objects &
python examples/after_an_import.py localhost:3999
"""

import sys

from opsqueue.producer import ProducerClient, SubmissionId


def unfinished(client: ProducerClient) -> list[SubmissionId]:
    """All of them, page by page, the oldest first."""
    found: list[SubmissionId] = []
    page = client.list_submissions("in_progress")
    while True:
        found += [status.submission.id for status in page.submissions]
        if page.cursor is None:
            return found
        page = client.list_submissions("in_progress", cursor=page.cursor)


def say(client: ProducerClient, submission: SubmissionId) -> None:
    progress = client.progress(submission)
    print(f"submission {submission.id}: {progress.state}, {progress.done} of {progress.total} chunks done", flush=True)


def main() -> None:
    (address,) = sys.argv[1:]
    client = ProducerClient(address, "memory://")  # it reads and writes no chunks
    submissions = unfinished(client)
    for submission in submissions:
        say(client, submission)
    for submission in submissions:
        client.wait(submission)
        say(client, submission)


if __name__ == "__main__":
    main()
