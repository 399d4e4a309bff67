-- The newest retry of a failed submission, so that asking again finds it; the row goes with the failed submission.
CREATE TABLE retries (
    submission_id INTEGER PRIMARY KEY,
    retry_id INTEGER NOT NULL
) STRICT;

-- Paused, failed and cancelled submissions, which are few among many: lists of them look at no others.
CREATE INDEX submissions_by_rare_state ON submissions (state, id) WHERE state IN (1, 3, 4);
