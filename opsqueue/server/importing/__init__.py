"""Brings the submissions of a stopped reference server over (`opsqueue import`, docs/upgrading.md)."""
