-- What the front-ends read. Every query ends within one call.

-- name: description
SELECT prefix, chunks_total, chunk_size, direct, strategic_metadata, otel_trace_carrier, metadata
FROM submissions WHERE id = ?;

-- name: status
SELECT state, prefix, chunks_total, chunks_done, chunk_size, direct, strategic_metadata, otel_trace_carrier, ended_us,
    failed_chunk, failure,
    (SELECT content FROM direct_inputs WHERE submission_id = id AND chunk_index = failed_chunk), metadata
FROM submissions WHERE id = ?;

-- name: direct_input
SELECT content FROM direct_inputs WHERE submission_id = ? AND chunk_index = ?;

-- name: direct_output
SELECT content FROM direct_outputs WHERE submission_id = ? AND chunk_index = ?;

-- name: blocks
SELECT block, done, packing FROM blocks WHERE submission_id = ? AND block >= ? ORDER BY block LIMIT ?;

-- name: newest_by_prefix
SELECT id FROM submissions WHERE prefix = ? ORDER BY id DESC LIMIT 1;

-- name: newest_by_key
SELECT id FROM submissions WHERE idempotency_key = ? ORDER BY id DESC LIMIT 1;

-- name: unfinished
SELECT id FROM submissions WHERE state < 2 ORDER BY id LIMIT ?;

-- Whether a pair is rare: counts at most so many.
-- name: count_pair
SELECT count(*) FROM (SELECT 1 FROM strategic_metadata WHERE key = ? AND value = ? LIMIT ?);

-- name: unfinished_with_pair
SELECT submission_id FROM strategic_metadata WHERE key = ? AND value = ? ORDER BY submission_id LIMIT ?;

-- The other pairs come as a JSON array of [key, value] arrays.
-- name: unfinished_with_pairs
SELECT submission_id FROM strategic_metadata AS first WHERE key = ? AND value = ? AND NOT EXISTS (
    SELECT 1 FROM json_each(?) AS pair WHERE NOT EXISTS (
        SELECT 1 FROM strategic_metadata AS other
        WHERE other.key = pair.value ->> 0 AND other.value = pair.value ->> 1
            AND other.submission_id = first.submission_id
    )
) ORDER BY submission_id LIMIT ?;

-- Pages of submissions, by the index that looks at the fewest others.
-- name: after
SELECT id, state, strategic_metadata FROM submissions WHERE id > ? ORDER BY id LIMIT ?;

-- name: after_unfinished
SELECT id, state, strategic_metadata FROM submissions WHERE state < 2 AND id > ? ORDER BY id LIMIT ?;

-- name: after_rare_state
SELECT id, state, strategic_metadata FROM submissions
WHERE state IN (1, 3, 4) AND state = ? AND id > ? ORDER BY id LIMIT ?;

-- name: after_with_pair
SELECT s.id, s.state, s.strategic_metadata
FROM strategic_metadata AS pair CROSS JOIN submissions AS s ON s.id = pair.submission_id
WHERE pair.key = ? AND pair.value = ? AND pair.submission_id > ? ORDER BY pair.submission_id LIMIT ?;
