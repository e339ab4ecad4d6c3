"""Workers as real processes: how they start, die and are replaced, who gets a request and who has to wait."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from d2o.config import D2OConfig, Policy
from d2o_server.engine.dispatcher import Dispatcher
from d2o_server.engine.messages import Admitted, AutoTerms, Ended, Failed, NewToken, Submit
from d2o_server.engine.ticket import Ticket
from d2o_server.engine.types import SamplingParams
from d2o_server.engine.worker_client import Worker
from d2o_server.errors import InvalidRequest, Overloaded, SettingsError, StartupError
from tests.server.engine.streams import events, silent, tiny_settings

pytestmark = pytest.mark.asyncio(loop_scope="module")
IDS = map(str, itertools.count())
PAGES = 90
# Three layers' pages of 32 slots: more than half of the pool, so that two do not fit at once.
BIG = 3 * -(-(10 + 600) // 32)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workers() -> AsyncIterator[list[Worker]]:
    both = [Worker(index, tiny_settings(num_pages=PAGES), silent) for index in range(2)]
    await asyncio.gather(*(worker.start() for worker in both))
    yield both
    await asyncio.gather(*(worker.stop() for worker in both))


@pytest_asyncio.fixture(loop_scope="module")
async def dispatcher(workers: list[Worker]) -> AsyncIterator[Dispatcher]:
    """Both workers, behind a queue of one request or 50 prompt tokens."""
    made = Dispatcher(workers, max_waiting=1, max_waiting_tokens=50)
    yield made
    for worker in workers:
        assert worker.waiting == {ticket.id: ticket for ticket in worker.tickets.values() if ticket.waiting}
        for ticket in list(worker.tickets.values()):
            made.release(ticket)
        await until_idle(worker)


def request(new_tokens: int, prompt: int = 10) -> Submit:
    return Submit(
        id=next(IDS),
        prompt=tuple(range(prompt)),
        sampling=SamplingParams(ignore_end_of_text=True),
        seed=0,
        config=D2OConfig(policy=Policy.NONE),
        end_ids=(),
        max_new_tokens=new_tokens,
    )


async def until_idle(worker: Worker) -> None:
    """Waits until a last request has ended: by then the worker has taken, and reported, all that was sent before it."""
    async with asyncio.timeout(30):
        while not worker.serving or worker.tickets:
            await asyncio.sleep(0.01)
        last = Ticket(request(1), 3, worker, queued=False, most_pages=3)
        worker.take(last)
        worker.send(last.message)
        await events(last)
        while worker.pool is None or worker.pool.reserved:
            await asyncio.sleep(0.01)


async def test_a_request_is_admitted_generates_and_ends(dispatcher: Dispatcher) -> None:
    ticket = dispatcher.submit(request(5), 3)
    assert ticket.waiting
    came = await events(ticket)
    assert [type(event) for event in came] == [Admitted, *[NewToken] * 5, Ended]
    assert not ticket.waiting
    assert ticket.done
    dispatcher.release(ticket)
    assert (dispatcher.running, dispatcher.waiting) == (0, [])


async def test_auto_is_told_what_its_owner_has_left(workers: list[Worker]) -> None:
    dispatcher = Dispatcher(workers, max_waiting=9, max_waiting_tokens=500)
    wanted = msgspec.structs.replace(request(2), config=D2OConfig(budget_tokens=8), auto=AutoTerms(2048))
    first = dispatcher.submit(wanted, 3, most_pages=10, owner="key:a", max_pages=19)
    assert (first.message.auto, first.most_pages) == (AutoTerms(2048, 19), 10)
    wanted = msgspec.structs.replace(wanted, id=next(IDS))
    second = dispatcher.submit(wanted, 3, most_pages=10, owner="key:a", max_pages=19)
    assert (second.message.auto, second.most_pages) == (AutoTerms(2048, 9), 3)
    for ticket in (first, second):
        await events(ticket)
        dispatcher.release(ticket)
    await asyncio.gather(*map(until_idle, workers))


async def test_requests_that_come_at_once_are_spread_over_workers(dispatcher: Dispatcher) -> None:
    tickets = [dispatcher.submit(request(20), 3) for _ in range(8)]
    assert [sum(ticket.worker is worker for ticket in tickets) for worker in dispatcher.workers] == [4, 4]
    await asyncio.gather(*map(events, tickets))


async def test_readers_of_all_requests_go_on_by_turns(workers: list[Worker]) -> None:
    dispatcher = Dispatcher(workers, max_waiting=99, max_waiting_tokens=5000)
    tickets = [dispatcher.submit(request(1), 3) for _ in range(40)]
    readers = [asyncio.create_task(ticket.events.get()) for ticket in tickets]
    await asyncio.sleep(0)
    for ticket in tickets:
        ticket.take(NewToken(id=ticket.id, token=1))
    done = [0]
    while done[-1] < len(readers):
        await asyncio.sleep(0)
        done.append(sum(reader.done() for reader in readers))
    assert max(later - sooner for sooner, later in itertools.pairwise(done)) == 8
    for ticket in tickets:
        dispatcher.release(ticket)
    await asyncio.gather(*map(until_idle, workers))


async def test_a_request_goes_to_the_worker_that_has_room(dispatcher: Dispatcher) -> None:
    big = dispatcher.submit(request(600), BIG)
    others = [dispatcher.submit(request(5), 3) for _ in range(4)]
    assert all(ticket.worker is not big.worker for ticket in others)
    await asyncio.gather(*map(events, others))


async def test_only_what_does_not_fit_counts_against_the_queue(dispatcher: Dispatcher) -> None:
    small = [dispatcher.submit(request(2), 3) for _ in range(20)]
    await asyncio.gather(*map(events, small))
    running = [dispatcher.submit(request(600), BIG) for _ in range(2)]
    waits = dispatcher.submit(request(600), BIG)
    with pytest.raises(Overloaded, match=r"^the queue is full \(1 requests wait\); try again in \d+ ms$") as full:
        dispatcher.submit(request(600), BIG)
    assert 100 <= full.value.retry_after_ms <= 30_000
    beside = dispatcher.submit(request(2), 3)
    assert [ticket.queued for ticket in (*running, waits, beside)] == [False, False, True, False]
    await events(beside)
    for ticket in running:
        dispatcher.release(ticket)
    assert isinstance((await events(waits))[-1], Ended)


async def test_a_queue_may_hold_one_prompt_of_any_length_but_not_two(workers: list[Worker]) -> None:
    dispatcher = Dispatcher(workers, max_waiting=10, max_waiting_tokens=50)
    tickets = [dispatcher.submit(request(600), BIG) for _ in range(2)]
    tickets.append(dispatcher.submit(request(500, prompt=110), BIG))
    with pytest.raises(Overloaded, match=r"^the queue is full \(110 prompt tokens wait\)"):
        dispatcher.submit(request(600), BIG)
    for ticket in tickets:
        dispatcher.release(ticket)
    await asyncio.gather(*map(until_idle, workers))


async def test_the_pause_is_when_pages_come_free(workers: list[Worker]) -> None:
    dispatcher = Dispatcher(workers, max_waiting=1, max_waiting_tokens=50)
    learnt = dispatcher.submit(request(600), BIG)
    await events(learnt)
    dispatcher.release(learnt)
    *running, waits = [dispatcher.submit(request(600), BIG) for _ in range(3)]
    for ticket in running:
        assert isinstance(await ticket.events.get(), Admitted)
    with pytest.raises(Overloaded) as full:
        dispatcher.submit(request(600), BIG)
    told, began = full.value.retry_after_ms / 1000, time.monotonic()
    assert isinstance(await waits.events.get(), Admitted)
    took = time.monotonic() - began
    # Two workers share the machine's cores now, and only one ran when the pace was learnt.
    assert took / 5 < told < 3 * took + 0.5
    for ticket in (*running, waits):
        dispatcher.release(ticket)
    await asyncio.gather(*map(until_idle, workers))


async def test_an_owner_s_pages_count_while_they_wait_and_until_they_are_back(workers: list[Worker]) -> None:
    dispatcher = Dispatcher(workers, max_waiting=9, max_waiting_tokens=500)
    with pytest.raises(InvalidRequest, match=rf"^prompt: got a request that needs {BIG} cache pages, allowed is reque"):
        dispatcher.submit(request(600), BIG, owner="key:a", max_pages=BIG - 1)
    ceiling = 3 * BIG + 2
    tickets = [dispatcher.submit(request(600), BIG, owner="key:a", max_pages=ceiling) for _ in range(3)]
    with pytest.raises(Overloaded, match=rf"^{3 * BIG} cache pages are reserved for this caller, 3 more") as full:
        dispatcher.submit(request(2), 3, owner="key:a", max_pages=ceiling)
    assert full.value.bound == "client_pages"
    assert 100 <= full.value.retry_after_ms <= 30_000
    others = [dispatcher.submit(request(2), 3, owner=name, max_pages=ceiling) for name in ("key:b", None)]
    dispatcher.release(tickets.pop())
    tickets.append(dispatcher.submit(request(2), 3, owner="key:a", max_pages=ceiling))
    for ticket in (*tickets, *others):
        dispatcher.release(ticket)
    await asyncio.gather(*map(until_idle, workers))


async def test_what_is_released_early_is_cancelled_in_the_worker(dispatcher: Dispatcher) -> None:
    ticket = dispatcher.submit(request(600), BIG)
    async with asyncio.timeout(5):
        assert isinstance(await ticket.events.get(), Admitted)
    dispatcher.release(ticket)
    await until_idle(ticket.worker)


async def test_a_stop_string_ends_a_request_as_finished(dispatcher: Dispatcher) -> None:
    ticket = dispatcher.submit(request(600), BIG)
    async with asyncio.timeout(5):
        while not isinstance(await ticket.events.get(), NewToken):
            pass
    dispatcher.stop_string(ticket)
    last = (await events(ticket))[-1]
    assert isinstance(last, Ended)
    assert last.reason == "stop"


def kill(worker: Worker) -> None:
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)


async def test_what_a_worker_runs_when_it_is_stopped_ends() -> None:
    worker = Worker(0, tiny_settings(num_pages=PAGES), silent)
    await worker.start()
    dispatcher = Dispatcher([worker], max_waiting=5, max_waiting_tokens=1000)
    cut = dispatcher.submit(request(600), BIG)
    began = time.monotonic()
    await worker.stop()
    assert time.monotonic() - began < 5
    last = (await events(cut))[-1]
    assert isinstance(last, Failed)
    assert last.error == "WorkerDied"
    assert worker.pid is None
    assert (worker.free_pages, dispatcher.waiting, dispatcher.running) == (0, [], 0)


async def test_a_worker_that_dies_before_it_has_connected_is_started_again() -> None:
    worker = Worker(0, tiny_settings(num_pages=PAGES), silent)
    await worker.start()
    dispatcher = Dispatcher([worker], max_waiting=5, max_waiting_tokens=1000)
    running, waiting = dispatcher.submit(request(600), BIG), dispatcher.submit(request(600), BIG)
    kill(worker)
    async with asyncio.timeout(10):
        while worker.serving or worker.pid is None:
            await asyncio.sleep(0.01)
    kill(worker)
    for ticket in (running, waiting):
        assert isinstance((await events(ticket))[-1], Ended)
    assert worker.restarts >= 2
    await worker.stop()


async def test_a_worker_that_dies_while_it_starts_is_reported() -> None:
    worker = Worker(3, tiny_settings(num_pages=PAGES), silent)
    starting = asyncio.ensure_future(worker.start())
    async with asyncio.timeout(10):
        while worker.pid is None:
            await asyncio.sleep(0.01)
    kill(worker)
    with pytest.raises(StartupError, match=r"^worker 3 did not start: its process ended with status -9, perhaps for"):
        await asyncio.wait_for(starting, 5)
    await worker.stop()


async def test_a_worker_that_refuses_to_start_says_why() -> None:
    told: list[str] = []
    worker = Worker(0, tiny_settings(num_pages=2), told.append)
    with pytest.raises(SettingsError, match=r"^num_pages: got 2, allowed is at least 3, which hold 6 tokens"):
        await worker.start()
    assert told == ["loading random:tiny-llama as float32 on cpu"]
    await worker.stop()
    assert worker.pid is None


async def test_a_socket_folder_that_cannot_be_used_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("a" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    worker = Worker(0, tiny_settings(num_pages=PAGES), silent)
    with pytest.raises(StartupError, match=r"^worker 0 did not start: .*, set TMPDIR to another folder"):
        await asyncio.wait_for(worker.start(), 5)
    await worker.stop()
