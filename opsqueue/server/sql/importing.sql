-- What `opsqueue import` reads of a reference server's file (the upper part) and writes into ours (the lower).

-- name: tables
SELECT name FROM sqlite_schema WHERE type = 'table';

-- name: columns
SELECT name FROM pragma_table_info(?);

-- name: applied_migrations
SELECT version, success, installed_on, execution_time FROM _sqlx_migrations ORDER BY version;

-- The columns come in the same order for every kind of submission.
-- name: old_unfinished
SELECT id, prefix, chunks_total, chunks_done, chunk_size, otel_trace_carrier, metadata, NULL, NULL, NULL
FROM submissions ORDER BY id;

-- name: old_completed
SELECT id, prefix, chunks_total, chunks_total, chunk_size, otel_trace_carrier, metadata, completed_at, NULL, NULL
FROM submissions_completed ORDER BY id;

-- name: old_failed
SELECT s.id, s.prefix, s.chunks_total, NULL, s.chunk_size, s.otel_trace_carrier, s.metadata, s.failed_at,
    s.failed_chunk_id, c.failure
FROM submissions_failed AS s
LEFT JOIN chunks_failed AS c ON c.submission_id = s.id AND c.chunk_index = s.failed_chunk_id ORDER BY s.id;

-- name: old_cancelled
SELECT id, prefix, chunks_total, chunks_done, NULL, '{}', metadata, cancelled_at, NULL, NULL
FROM submissions_cancelled ORDER BY id;

-- name: old_total
SELECT coalesce(sum(chunks_total), 0) FROM submissions;

-- A key that has several values counts with the highest, as in the reference's own later schema.
-- name: old_strategic
SELECT metadata_key, max(metadata_value) FROM submissions_metadata WHERE submission_id = ? GROUP BY metadata_key;

-- Both kinds of chunks that are not done are looked over in one pass before they are read one by one.
-- name: old_waiting_summary
SELECT count(*), coalesce(min(chunk_index), 0), coalesce(max(chunk_index), 0), coalesce(min(retries), 0),
    coalesce(sum(retries > 0), 0)
FROM chunks WHERE submission_id = ?;

-- name: old_waiting
SELECT chunk_index, retries FROM chunks WHERE submission_id = ? ORDER BY chunk_index;

-- name: old_inputs
SELECT chunk_index, input_content FROM chunks WHERE submission_id = ? ORDER BY chunk_index;

-- name: old_not_done_summary
SELECT count(*), coalesce(min(chunk_index), 0), coalesce(max(chunk_index), 0), 0, 0
FROM chunks_failed WHERE submission_id = ?;

-- name: old_not_done
SELECT chunk_index, 0 FROM chunks_failed WHERE submission_id = ? ORDER BY chunk_index;

-- name: old_not_done_inputs
SELECT chunk_index, input_content FROM chunks_failed WHERE submission_id = ? ORDER BY chunk_index;

-- name: old_outputs
SELECT chunk_index, output_content FROM chunks_completed
WHERE submission_id = ? AND output_content IS NOT NULL ORDER BY chunk_index;

-- name: is_known
SELECT 1 FROM submissions WHERE id = ?;

-- name: is_empty
SELECT NOT EXISTS (SELECT 1 FROM submissions);

-- name: unfinished_with_prefix
SELECT id FROM submissions WHERE prefix = ? AND state < 2 AND id <> ? LIMIT 1;

-- name: last_batch
SELECT max(coalesce((SELECT max(batch) FROM log), 0), coalesce((SELECT value FROM marks WHERE name = 'last_batch'), 0));

-- name: mark
SELECT coalesce((SELECT value FROM marks WHERE name = ?), 0);

-- name: insert
INSERT INTO submissions (id, state, chunks_total, chunk_size, direct, chunks_done, ended_us, failed_chunk, fingerprint,
    prefix, strategic_metadata, otel_trace_carrier, failure, metadata)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: insert_direct_output
INSERT INTO direct_outputs (submission_id, chunk_index, content) VALUES (?, ?, ?);
