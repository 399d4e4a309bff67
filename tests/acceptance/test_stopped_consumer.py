"""A consumer whose process stood still, as on a machine that slept, goes on when it wakes."""

from __future__ import annotations

import signal

from opsqueue.producer import ProducerClient
from tests.conftest import ServerFactory
from tests.support.processes import python_process
from tests.support.raw_producer import RawProducer


def test_a_consumer_that_was_closed_for_missed_heartbeats_connects_again(
    server_factory: ServerFactory, store_url: str
) -> None:
    server = server_factory(heartbeat_interval="100ms", max_missable_heartbeats=1)
    client = ProducerClient(server.address, store_url)
    with RawProducer(server.port) as producer, python_process("echo_consumer", server.address, store_url) as consumer:
        producer.wait_for_metric("opsqueue_consumers_connected", 1)
        consumer.send_signal(signal.SIGSTOP)
        producer.wait_for_metric("opsqueue_consumers_rejected_total", 1)
        consumer.send_signal(signal.SIGCONT)
        assert list(client.run_submission([1, 2, 3], chunk_size=2)) == [1, 2, 3]
