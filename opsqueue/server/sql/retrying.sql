-- What a retry of a failed submission reads and writes, inside a batch's transaction.

-- name: failed
SELECT state, chunks_total, chunks_done, chunk_size, direct, strategic_metadata, prefix, idempotency_key
FROM submissions WHERE id = ?;

-- name: newest_retry
SELECT s.id, s.state FROM retries AS r JOIN submissions AS s ON s.id = r.retry_id WHERE r.submission_id = ?;

-- name: blocks
SELECT block, done, packing FROM blocks WHERE submission_id = ? ORDER BY block;

-- name: copy_submission
INSERT INTO submissions (id, state, chunks_total, chunk_size, direct, fingerprint, prefix, idempotency_key,
    strategic_metadata, otel_trace_carrier, metadata)
SELECT ?, 0, chunks_total, chunk_size, direct, fingerprint, prefix, idempotency_key, strategic_metadata,
    otel_trace_carrier, metadata
FROM submissions WHERE id = ?;

-- name: copy_direct_inputs
INSERT INTO direct_inputs (submission_id, chunk_index, content)
SELECT ?, chunk_index, content FROM direct_inputs WHERE submission_id = ?;

-- name: copy_direct_outputs
INSERT INTO direct_outputs (submission_id, chunk_index, content)
SELECT ?, chunk_index, content FROM direct_outputs WHERE submission_id = ?;

-- name: note_retry
INSERT OR REPLACE INTO retries (submission_id, retry_id) VALUES (?, ?);
