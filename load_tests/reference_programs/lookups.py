"""Reference client: insert, look up, count, status, version. Arguments: address, store URL."""

import sys

from opsqueue.producer import ProducerClient, SubmissionStatus

client = ProducerClient(sys.argv[1], sys.argv[2])
submission = client.insert_submission_chunks(
    iter([b"one", b"two"]), metadata=b"\x00\xffmeta", strategic_metadata={"company": 7}, chunk_size=2
)
status = client.get_submission_status(submission)
if not isinstance(status, SubmissionStatus.InProgress):
    sys.exit(f"not in progress: {status}")
print("version", client.server_version())
print("count", client.count_submissions())
print("metadata", list(status.submission.metadata), "total", status.submission.chunks_total)
print("completed", client.is_completed(submission) if hasattr(client.inner, "is_completed") else False)
print("id", submission)
