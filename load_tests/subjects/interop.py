"""The reference's own published client, unmodified, through files: everything included."""

from __future__ import annotations

from collections.abc import Iterator

from load_tests.figures import Figure, Processors, did_not_run
from load_tests.reference_client import VERSION, ReferenceClient, find_python312
from load_tests.setting import Bench

#: Consumers, and chunks a second that the reference's client reaches with the reference's server.
CASES = ((2, 39), (8, 95))


def measure(bench: Bench) -> Iterator[Figure]:
    what = f"the reference's client {VERSION}, end to end"
    python = find_python312()
    if python is None:
        yield did_not_run(what, "it is a wheel for CPython 3.12, which is not here")
        return
    client = ReferenceClient(python)
    for consumers, reference in CASES:
        with bench.server_of_many_files() as server, Processors(server) as processors:
            seconds = client.roundtrip(
                server.address,
                server.directory / "objects",
                chunks=bench.scale.reference_chunks,
                chunk_size=10,
                consumers=consumers,
            )
        yield Figure(
            f"{what}, {consumers} consumers",
            bench.scale.reference_chunks / seconds,
            "chunks/s",
            reference,
            limit=processors.limit(),
            note=f"{bench.scale.reference_chunks:,} chunks of 10 no-op operations through files",
        )
