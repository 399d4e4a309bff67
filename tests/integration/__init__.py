"""Parts together: real sockets, rings, files and processes."""
