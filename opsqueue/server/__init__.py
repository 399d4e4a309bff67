"""The server's processes: supervisor, front-ends, writer."""
