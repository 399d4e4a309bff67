"""A holder hears that it has lost a chunk before it is given the same chunk again."""

from __future__ import annotations

from tests.acceptance.conftest import Serve


def test_an_expiry_is_told_before_the_chunk_is_handed_to_the_same_connection_again(serve: Serve) -> None:
    wire = serve(reservation_expiration="300ms")
    submission = wire.producer.insert(1)
    consumer = wire.consumer()
    assert consumer.reserve_ids(1) == [(submission, 0)]
    nonce = consumer.ask(1)
    assert consumer.receive() == {"Async": {"ChunkReservationExpired": {"submission_id": submission, "chunk_index": 0}}}
    [again] = consumer.chunks(nonce)
    assert again.id == (submission, 0)
    assert again.chunk["retries"] == 1
