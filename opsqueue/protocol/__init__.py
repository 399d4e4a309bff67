"""The wire messages as types; no I/O. Both server and client import it, it imports neither."""
