-- Forgetting ended submissions. What belongs to one goes in bounded steps, its own row last.

-- name: oldest_ended
SELECT id, state FROM submissions WHERE state >= 2 AND ended_us < ? ORDER BY ended_us LIMIT ?;

-- name: delete_inputs
DELETE FROM direct_inputs WHERE submission_id = ?1 AND chunk_index < ?2 + (
    SELECT min(chunk_index) FROM direct_inputs WHERE submission_id = ?1);

-- name: delete_outputs
DELETE FROM direct_outputs WHERE submission_id = ?1 AND chunk_index < ?2 + (
    SELECT min(chunk_index) FROM direct_outputs WHERE submission_id = ?1);

-- name: delete_blocks
DELETE FROM blocks WHERE submission_id = ?1 AND block < ?2 + (
    SELECT min(block) FROM blocks WHERE submission_id = ?1);

-- name: delete_retry
DELETE FROM retries WHERE submission_id = ?;

-- name: delete_submission
DELETE FROM submissions WHERE id = ?;
