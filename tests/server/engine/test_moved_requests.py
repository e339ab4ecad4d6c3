"""Requests that wait at one worker and move to another that has pages again: nothing is lost, nothing comes twice."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio

from d2o.config import D2OConfig, Policy
from d2o_server.engine.dispatcher import Dispatcher
from d2o_server.engine.messages import Admitted, Ended, NewToken, Submit
from d2o_server.engine.supervision import Supervision
from d2o_server.engine.ticket import Ticket
from d2o_server.engine.types import SamplingParams
from d2o_server.engine.worker_client import Worker
from tests.server.engine.streams import events, silent, tiny_settings, tokens, until_it_has

pytestmark = pytest.mark.asyncio(loop_scope="module")
IDS = map(str, itertools.count())
PAGES, PAGE_SIZE, LAYERS = 300, 32, 3
ALMOST_ALL, TWO_THIRDS, HALF = 297, 198, 150


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workers() -> AsyncIterator[list[Worker]]:
    quick = Supervision(first_pause=0.1, longest_pause=0.1)
    both = [Worker(index, tiny_settings(num_pages=PAGES), silent, supervision=quick) for index in range(2)]
    await asyncio.gather(*(worker.start() for worker in both))
    yield both
    await asyncio.gather(*(worker.stop() for worker in both))


@pytest_asyncio.fixture(loop_scope="module")
async def dispatcher(workers: list[Worker]) -> AsyncIterator[Dispatcher]:
    """Both workers, which after the test hold nothing."""
    made = Dispatcher(workers, max_waiting=100, max_waiting_tokens=100_000)
    yield made
    for worker in workers:
        wake(worker)
        for ticket in list(worker.tickets.values()):
            made.release(ticket)
    for worker in workers:
        await until_idle(worker)
        assert (worker.tickets, worker.waiting, list(worker.line), worker.line.pages) == ({}, {}, [], 0)


def request(pages: int, new: int = 20, due: float = 0.0) -> Submit:
    """One that needs ``pages`` and, but for what is ``new``, spends them on its prompt."""
    prompt = pages // LAYERS * PAGE_SIZE - new
    return Submit(
        id=next(IDS),
        prompt=tuple(place % 300 for place in range(prompt)),
        sampling=SamplingParams(ignore_end_of_text=True),
        seed=0,
        config=D2OConfig(policy=Policy.NONE),
        end_ids=(),
        max_new_tokens=new,
        due=due,
    )


def submit(dispatcher: Dispatcher, pages: int, new: int = 20, due: float = 0.0) -> Ticket:
    return dispatcher.submit(request(pages, new, due), pages)


async def hold(dispatcher: Dispatcher, *pages: int) -> list[Ticket]:
    """Long answers that have begun and hold so many pages, one at each worker in their order."""
    held = [submit(dispatcher, each, new=each // LAYERS * PAGE_SIZE - 10) for each in pages]
    assert [ticket.worker for ticket in held] == list(dispatcher.workers)
    await asyncio.gather(*(until_it_has(ticket, 20) for ticket in held))
    return held


async def until_idle(worker: Worker) -> None:
    """Waits until a last request has ended: by then the worker has taken, and reported, all that was sent before it."""
    async with asyncio.timeout(60):
        while not worker.serving:
            await asyncio.sleep(0.01)
        message = request(3)
        last = Ticket(message, 3, worker, queued=False, most_pages=3)
        worker.take(last)
        worker.send(message)
        await events(last)
        while worker.pool is None or worker.pool.reserved or worker.pool.waiting:
            await asyncio.sleep(0.01)


def send(worker: Worker, number: signal.Signals) -> None:
    assert worker.pid is not None
    os.kill(worker.pid, number)


def halt(worker: Worker) -> None:
    send(worker, signal.SIGSTOP)


def wake(worker: Worker) -> None:
    if worker.pid is not None:
        send(worker, signal.SIGCONT)


def say_full(worker: Worker) -> None:
    """Has the front believe, until the worker reports again, that none of its pages is free."""
    assert worker.pool is not None
    worker.pool = msgspec.structs.replace(worker.pool, reserved=worker.pool.total)


def say_empty(worker: Worker) -> None:
    assert worker.pool is not None
    worker.pool = msgspec.structs.replace(worker.pool, reserved=0)


async def test_a_request_that_waits_moves_to_a_worker_that_has_pages_again(dispatcher: Dispatcher) -> None:
    alone = await events(submit(dispatcher, TWO_THIRDS))
    held = await hold(dispatcher, HALF, TWO_THIRDS)
    waits = submit(dispatcher, TWO_THIRDS)
    assert waits.worker is held[0].worker
    halt(held[0].worker)
    dispatcher.release(held[1])
    came = await events(waits)
    assert [type(event) for event in came] == [Admitted, *[NewToken] * 20, Ended]
    assert tokens(came) == tokens(alone)
    assert (waits.worker, waits.resumed) == (held[1].worker, 0)
    assert not held[0].done


async def test_those_that_wait_move_by_their_turns(dispatcher: Dispatcher) -> None:
    first, second = dispatcher.workers
    held = await hold(dispatcher, ALMOST_ALL, ALMOST_ALL)
    dues = (-20.0, -90.0, -50.0, -70.0, -30.0, -10.0)
    waiting = {due: submit(dispatcher, TWO_THIRDS, due=due) for due in dues}
    here = sorted(due for due, ticket in waiting.items() if ticket.worker is first)
    assert here == [-50.0, -30.0, -20.0]
    halt(first)
    for due in (-90.0, -70.0, -10.0):
        dispatcher.release(waiting[due])
    dispatcher.release(held[1])
    await asyncio.gather(*(events(waiting[due]) for due in here))
    admitted = [waiting[due].admitted for due in here]
    assert None not in admitted
    assert admitted == sorted(admitted, key=lambda at: at or 0)
    assert {waiting[due].worker for due in here} == {second}


async def test_only_what_is_due_earlier_passes_one_that_waits_for_more_pages(dispatcher: Dispatcher) -> None:
    full, half = dispatcher.workers
    held = await hold(dispatcher, ALMOST_ALL, HALF)
    halt(full)
    large = submit(dispatcher, TWO_THIRDS, due=-50.0)
    assert large.worker is half
    later = submit(dispatcher, HALF, due=0.0)
    sooner = submit(dispatcher, HALF, due=-90.0)
    await events(sooner)
    assert (sooner.worker, later.worker) == (half, full)
    assert (large.waiting, later.waiting) == (True, True)
    # Nobody waits for the pages any more once the large one has been given up.
    dispatcher.release(large)
    await events(later)
    assert later.worker is half
    assert not any(ticket.done for ticket in held)


async def test_a_worker_that_is_back_takes_from_the_queue_of_the_one_that_was_left(dispatcher: Dispatcher) -> None:
    left, dies = dispatcher.workers
    alone = await events(submit(dispatcher, TWO_THIRDS, new=1500))
    held = await hold(dispatcher, ALMOST_ALL, HALF)
    dispatcher.release(held[1])
    cut = submit(dispatcher, TWO_THIRDS, new=1500)
    await until_it_has(cut, 20)
    assert cut.worker is dies
    urgent, other = (submit(dispatcher, TWO_THIRDS, due=due) for due in (-90.0, -10.0))
    halt(left)
    restarts = dies.restarts
    send(dies, signal.SIGKILL)
    came = await asyncio.gather(events(cut), events(urgent), events(other))
    assert dies.restarts == restarts + 1
    assert (cut.resumed, urgent.resumed, other.resumed) == (1, 0, 0)
    assert [type(event) for event in came[0]] == [Admitted, *[NewToken] * 1500, Ended]
    assert tokens(came[0]) == tokens(alone)
    assert tokens(came[1]) == tokens(came[2])
    assert urgent.admitted is not None
    assert other.admitted is not None
    assert urgent.admitted < other.admitted
    assert {ticket.worker for ticket in (cut, urgent, other)} == {dies}
    assert not held[0].done


async def test_a_stop_string_moves_with_the_request_that_it_ends(dispatcher: Dispatcher) -> None:
    left, dies = dispatcher.workers
    _, cut = await hold(dispatcher, ALMOST_ALL, HALF)
    halt(left)
    send(dies, signal.SIGKILL)
    async with asyncio.timeout(30):
        while cut.worker is dies:
            await asyncio.sleep(0.005)
    dispatcher.stop_string(cut)
    last = (await events(cut))[-1]
    assert isinstance(last, Ended)
    assert (last.reason, cut.worker) == ("stop", dies)


@pytest.mark.parametrize("times", [1, 2])
async def test_what_the_old_worker_says_meanwhile_is_not_the_new_one_s(dispatcher: Dispatcher, times: int) -> None:
    """The first has begun with the request, and said so, when it is moved; with the second move it comes back there."""
    first, second = dispatcher.workers
    alone = await events(submit(dispatcher, ALMOST_ALL, new=3000))
    await asyncio.gather(*map(until_idle, dispatcher.workers))
    before = first.generated_tokens + second.generated_tokens
    ticket = submit(dispatcher, ALMOST_ALL, new=3000)
    assert ticket.worker is first
    time.sleep(0.5)  # noqa: ASYNC251 - nobody hears what it says
    for target, other in ((second, first), (first, second))[:times]:
        say_full(other)
        say_empty(target)
        dispatcher.pages_freed(target)
        assert ticket.worker is target
    came = await events(ticket)
    assert [type(event) for event in came] == [Admitted, *[NewToken] * 3000, Ended]
    assert tokens(came) == tokens(alone)
    assert ticket.output == tokens(alone)
    # The old one was told to forget it.
    assert first.generated_tokens + second.generated_tokens - before < 5000


@pytest.mark.parametrize("begun", [True, False])
async def test_a_request_that_is_left_while_it_moves_leaves_nothing(dispatcher: Dispatcher, begun: bool) -> None:
    """``begun``: the worker from which it is taken has admitted it."""
    first, second = dispatcher.workers
    before = first.generated_tokens + second.generated_tokens
    ticket = submit(dispatcher, ALMOST_ALL, new=3000)
    if begun:
        time.sleep(0.5)  # noqa: ASYNC251 - nobody hears what it says
    say_full(first)
    dispatcher.pages_freed(second)
    assert ticket.worker is second
    dispatcher.release(ticket)
    assert (dispatcher.waiting, dispatcher.running) == ([], 0)
    await asyncio.gather(*map(until_idle, dispatcher.workers))
    assert first.generated_tokens + second.generated_tokens - before < 2000
    assert ticket.output == []
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ticket.events.get(), 0.05)


async def test_a_deadline_passes_while_a_request_moves(dispatcher: Dispatcher) -> None:
    first, second = dispatcher.workers
    ticket = submit(dispatcher, TWO_THIRDS, new=1500)
    halt(second)
    say_full(first)
    dispatcher.pages_freed(second)
    with ticket.events.expiring(time.monotonic() + 0.2), pytest.raises(TimeoutError):
        await ticket.events.get()
    assert (ticket.waiting, ticket.worker, dispatcher.waiting) == (True, second, [ticket])
    dispatcher.release(ticket)
    wake(second)
    await asyncio.gather(*map(until_idle, dispatcher.workers))
    assert ticket.output == []


async def test_what_moved_counts_once_in_the_queue_and_the_old_worker_s_room(dispatcher: Dispatcher) -> None:
    first, second = dispatcher.workers
    ticket = submit(dispatcher, TWO_THIRDS)
    say_full(first)
    dispatcher.pages_freed(second)
    assert dispatcher.waiting == [ticket]
    assert (first.line.pages, second.line.pages) == (0, TWO_THIRDS)
    assert (first.tickets, list(second.tickets.values())) == ({}, [ticket])
    await events(ticket)
