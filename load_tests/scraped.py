"""What a server's own metrics say."""

from __future__ import annotations

from load_tests import peers
from load_tests.server_process import ServerProcess


def metrics(server: ServerProcess) -> dict[str, float]:
    """Every series of GET /metrics, by its name with its labels."""
    with peers.connect(server.address) as connection:
        text = peers.exchange(connection, peers.request(server.address, "GET", "/metrics")).decode()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in text.splitlines() if line and line[0] != "#")
    }
