"""Front-end process: HTTP and WebSocket connections; no queue state."""
