-- What a start reads, each in one pass.

-- name: log
SELECT batch, events FROM log ORDER BY batch;

-- name: unfinished
SELECT id, state, chunks_total, chunk_size, direct, strategic_metadata FROM submissions WHERE state < 2 ORDER BY id;

-- name: ended
SELECT id, state, chunks_total, chunk_size, direct, strategic_metadata FROM submissions
WHERE id = ? AND state IN (3, 4);

-- name: unfinished_blocks
SELECT b.submission_id, b.block, b.batch, b.done, b.attempts, s.chunks_total, b.packing
FROM submissions AS s CROSS JOIN blocks AS b ON b.submission_id = s.id WHERE s.state < 2 ORDER BY s.id, b.block;

-- name: blocks_of
SELECT b.submission_id, b.block, b.batch, b.done, b.attempts, s.chunks_total, b.packing
FROM submissions AS s CROSS JOIN blocks AS b ON b.submission_id = s.id WHERE s.id = ? ORDER BY b.block;

-- name: failed_or_cancelled
SELECT id FROM submissions WHERE state IN (1, 3, 4) AND state > 1;

-- name: last_logged
SELECT coalesce(max(batch), 0) FROM log;

-- name: count_ended
SELECT coalesce(sum(state = 2), 0), min(CASE WHEN state > 4 THEN id END) FROM submissions WHERE state >= 2;

-- name: mark
SELECT value FROM marks WHERE name = ?;
