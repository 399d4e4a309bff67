"""What a request to the writer promises: one answer, whatever happens to the writer or the ring."""

from __future__ import annotations

import asyncio

import pytest

from opsqueue.server import requests
from opsqueue.server.frontend.writer_client import WriterClient, WriterRestartedError, WriterUnavailableError


class ScriptedPump:
    """Stands in for the ring, to inject a full one and a writer that never answers."""

    def __init__(self, full: bool = False) -> None:
        self.full = full
        self.sent: list[tuple[int, bytes]] = []
        self.arrived = asyncio.Event()
        self.waiters: list[asyncio.Future[None]] = []

    def send_request(self, request_id: int, payload: bytes) -> bool:
        if self.full:
            return False
        self.sent.append((request_id, payload))
        self.arrived.set()
        return True

    def room(self) -> asyncio.Future[None]:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        self.arrived.set()
        return waiter

    def make_room(self) -> None:
        self.full = False
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)


def client_of(pump: ScriptedPump) -> WriterClient:
    client = WriterClient()
    client.attach(pump)
    return client


async def test_a_reply_reaches_the_request_with_its_number() -> None:
    pump = ScriptedPump()
    client = client_of(pump)
    first, second = (asyncio.create_task(client.ask(requests.Status(number))) for number in (1, 2))
    while len(pump.sent) < 2:
        await asyncio.sleep(0)  # because others need a turn
    client.on_reply(pump.sent[1][0], requests.encode(requests.Progress(2, False)))
    client.on_reply(pump.sent[0][0], requests.encode(requests.Progress(1, True)))
    assert await first == requests.Progress(1, True)
    assert await second == requests.Progress(2, False)
    assert client.pending == 0


async def test_a_writer_that_does_not_answer_in_time_is_unavailable_and_its_late_reply_is_dropped() -> None:
    pump = ScriptedPump()
    client = client_of(pump)
    with pytest.raises(WriterUnavailableError, match="does not answer"):
        await client.ask(requests.Counts(), timeout_s=0.01)
    client.on_reply(pump.sent[0][0], requests.encode(requests.Counted(1, 2)))
    assert client.pending == 0


async def test_a_full_ring_delays_a_request_and_does_not_lose_it() -> None:
    pump = ScriptedPump(full=True)
    client = client_of(pump)
    asked = asyncio.create_task(client.ask(requests.Counts()))
    await pump.arrived.wait()
    assert pump.sent == []
    pump.arrived.clear()
    pump.make_room()
    await pump.arrived.wait()
    client.on_reply(pump.sent[0][0], requests.encode(requests.Counted(1, 2)))
    assert await asked == requests.Counted(1, 2)


async def test_a_pump_that_has_stopped_is_unavailable_at_once() -> None:
    class StoppedPump(ScriptedPump):
        def room(self) -> asyncio.Future[None]:
            waiter = super().room()
            waiter.cancel()
            return waiter

    with pytest.raises(WriterUnavailableError, match="cut off"):
        await client_of(StoppedPump(full=True)).ask(requests.Counts())


async def test_a_ring_that_stays_full_ends_in_unavailable() -> None:
    with pytest.raises(WriterUnavailableError):
        await client_of(ScriptedPump(full=True)).ask(requests.Counts(), timeout_s=0.01)


async def test_a_restarted_writer_answers_every_request_that_was_sent() -> None:
    pump = ScriptedPump()
    client = client_of(pump)
    asked = asyncio.create_task(client.ask(requests.Counts()))
    await pump.arrived.wait()
    client.on_writer_restart()
    with pytest.raises(WriterRestartedError):
        await asked
    assert client.pending == 0


async def test_a_request_that_could_not_be_sent_yet_goes_to_the_new_writer() -> None:
    pump = ScriptedPump(full=True)
    client = client_of(pump)
    asked = asyncio.create_task(client.ask(requests.Counts()))
    await pump.arrived.wait()
    client.on_writer_restart()
    pump.arrived.clear()
    pump.make_room()
    await pump.arrived.wait()
    client.on_reply(pump.sent[0][0], requests.encode(requests.Counted(1, 2)))
    assert await asked == requests.Counted(1, 2)


@pytest.mark.parametrize("full", [False, True])
async def test_after_closing_everything_is_answered_at_once_with_the_reason(full: bool) -> None:
    pump = ScriptedPump(full)
    client = client_of(pump)
    asked = asyncio.create_task(client.ask(requests.Counts()))
    await pump.arrived.wait()
    client.close("stopping")
    for late in (asked, client.ask(requests.Ping())):
        with pytest.raises(WriterUnavailableError, match="stopping"):
            await late


async def test_before_a_pump_is_there_the_writer_is_unavailable() -> None:
    with pytest.raises(WriterUnavailableError, match="starting"):
        await WriterClient().ask(requests.Ping())
