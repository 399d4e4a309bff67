-- What a batch does, and what decides an insert's idempotency.

-- name: log_row
INSERT INTO log (batch, events) VALUES (?, ?);

-- name: end
UPDATE submissions SET state = ?, chunks_done = ?, ended_us = ?, failed_chunk = ?, failure = ?
WHERE id = ? AND state < 2 RETURNING id, strategic_metadata;

-- name: drop_strategic
DELETE FROM strategic_metadata WHERE key = ? AND value = ? AND submission_id = ?;

-- name: pause
UPDATE submissions SET state = ? WHERE id = ? AND state < 2;

-- name: newest_by_prefix
SELECT id, state, ended_us, fingerprint FROM submissions WHERE prefix = ? ORDER BY id DESC LIMIT 1;

-- name: newest_by_key
SELECT id, state, ended_us, fingerprint FROM submissions WHERE idempotency_key = ? ORDER BY id DESC LIMIT 1;

-- name: insert
INSERT INTO submissions (id, state, chunks_total, chunk_size, direct, ended_us, fingerprint, prefix, idempotency_key,
    strategic_metadata, otel_trace_carrier, metadata)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: insert_strategic
INSERT INTO strategic_metadata (key, value, submission_id) VALUES (?, ?, ?);

-- name: insert_direct_input
INSERT INTO direct_inputs (submission_id, chunk_index, content) VALUES (?, ?, ?);

-- The submission may have been forgotten since: nothing is left behind for it.
-- name: insert_direct_output
INSERT OR IGNORE INTO direct_outputs (submission_id, chunk_index, content)
SELECT id, ?2, ?3 FROM submissions WHERE id = ?1;

-- The row of placeholders is repeated for as many blocks as are written at once.
-- name: write_blocks
INSERT OR REPLACE INTO blocks (submission_id, block, batch, done, attempts, packing)
SELECT column1, column2, column3, column4, column5, column6 FROM (VALUES (?, ?, ?, ?, ?, ?))
WHERE EXISTS (SELECT 1 FROM submissions WHERE id = column1);

-- name: delete_log
DELETE FROM log WHERE batch <= ?;

-- name: set_mark
INSERT OR REPLACE INTO marks (name, value) VALUES (?, ?);
