"""Inner parts of the client library: HTTP, WebSocket, object store, uploads and downloads."""
