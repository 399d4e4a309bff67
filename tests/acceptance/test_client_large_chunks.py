"""Large chunks both ways at once on one connection: sending never keeps the client from receiving."""

from __future__ import annotations

import threading

from opsqueue.consumer import ConsumerClient, Strategy
from opsqueue.producer import ProducerClient
from tests.conftest import ServerFactory

SIZE = 6 * 1024 * 1024
CHUNKS = 8
THREADS = 4


def test_threads_that_share_a_client_receive_large_chunks_while_they_send_large_ones(
    server_factory: ServerFactory,
) -> None:
    server = server_factory(max_body_size="256MiB")
    producer = ProducerClient(server.address, "memory://")
    consumer = ConsumerClient(server.address, "memory://")
    submission = producer.inner.insert_submission_direct([bytes([200]) * SIZE] * CHUNKS)

    def work() -> None:
        for chunk in consumer.reserve_chunks(1, Strategy.Oldest()):
            assert len(chunk.input_content) == SIZE
            consumer.complete_chunk(chunk.submission_id, None, chunk.chunk_index, b"x" * SIZE)

    def work_twice() -> None:
        for _ in range(CHUNKS // THREADS):
            work()

    threads = [threading.Thread(target=work_twice, daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a thread waits for ever"
    results = list(producer.blocking_stream_completed_submission_chunks(submission, timeout=20))
    assert [len(result) for result in results] == [SIZE] * CHUNKS
