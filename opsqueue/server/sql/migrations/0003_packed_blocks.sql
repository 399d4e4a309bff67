-- How `done` is written: 0 bit by bit, 1 packed (docs/journal.md). Rows from before are bit by bit.
ALTER TABLE blocks ADD COLUMN packing INTEGER NOT NULL DEFAULT 0;
