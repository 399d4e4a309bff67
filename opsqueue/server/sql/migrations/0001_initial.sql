-- docs/journal.md explains every table. Times are microseconds since the Unix epoch.

CREATE TABLE submissions (
    id INTEGER PRIMARY KEY,
    -- 0 in progress, 1 paused, 2 completed, 3 failed, 4 cancelled
    state INTEGER NOT NULL CHECK (state BETWEEN 0 AND 4),
    chunks_total INTEGER NOT NULL CHECK (chunks_total >= 0),
    chunk_size INTEGER NOT NULL,
    -- 1: the inputs are in direct_inputs; 0: they are in the object store under the prefix
    direct INTEGER NOT NULL CHECK (direct IN (0, 1)),
    -- as of the end; until then the blocks and the log tell
    chunks_done INTEGER NOT NULL DEFAULT 0,
    ended_us INTEGER CHECK ((ended_us IS NOT NULL) = (state >= 2)),
    failed_chunk INTEGER,
    fingerprint BLOB NOT NULL,
    prefix TEXT,
    idempotency_key TEXT,
    -- a JSON object of integers
    strategic_metadata TEXT NOT NULL,
    -- JSON text, as it is given out
    otel_trace_carrier TEXT NOT NULL,
    failure TEXT,
    -- last: whoever needs none does not read its overflow pages
    metadata BLOB
) STRICT;

CREATE INDEX submissions_by_prefix ON submissions (prefix, id) WHERE prefix IS NOT NULL;
CREATE INDEX submissions_by_key ON submissions (idempotency_key, id) WHERE idempotency_key IS NOT NULL;
CREATE INDEX submissions_unfinished ON submissions (id) WHERE state < 2;
CREATE INDEX submissions_ended ON submissions (ended_us, state) WHERE state >= 2;

-- The strategic metadata of unfinished submissions, for lookups; the row goes when the submission ends.
CREATE TABLE strategic_metadata (
    key TEXT NOT NULL,
    value INTEGER NOT NULL,
    submission_id INTEGER NOT NULL,
    PRIMARY KEY (key, value, submission_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE direct_inputs (
    submission_id INTEGER NOT NULL,
    chunk_index INTEGER NOT NULL,
    content BLOB NOT NULL,
    PRIMARY KEY (submission_id, chunk_index)
) STRICT, WITHOUT ROWID;

CREATE TABLE direct_outputs (
    submission_id INTEGER NOT NULL,
    chunk_index INTEGER NOT NULL,
    content BLOB NOT NULL,
    PRIMARY KEY (submission_id, chunk_index)
) STRICT, WITHOUT ROWID;

-- 4,096 chunks each, as they were when batch `batch` closed; no row: as the insert left them.
CREATE TABLE blocks (
    submission_id INTEGER NOT NULL,
    block INTEGER NOT NULL,
    batch INTEGER NOT NULL,
    done BLOB NOT NULL,
    attempts BLOB NOT NULL,
    PRIMARY KEY (submission_id, block)
) STRICT, WITHOUT ROWID;

-- What batches did to chunks and no block says yet.
CREATE TABLE log (
    batch INTEGER PRIMARY KEY,
    events BLOB NOT NULL
) STRICT;

-- last_batch: no number up to it is used again. id_mark_ms: no submission id lies after it.
CREATE TABLE marks (
    name TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
