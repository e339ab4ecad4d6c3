"""Requests whose worker dies, hangs or stands still: no token lost, none twice, and an end where nobody can go on."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import psutil
import pytest
import pytest_asyncio

from d2o.config import D2OConfig, Policy
from d2o_server.engine.dispatcher import Dispatcher
from d2o_server.engine.messages import Admitted, AutoTerms, Ended, Failed, NewToken, Submit, WorkerSettings
from d2o_server.engine.supervision import Supervision
from d2o_server.engine.ticket import TicketEvent
from d2o_server.engine.types import SamplingParams
from d2o_server.engine.worker_client import Worker
from d2o_server.errors import NoWorker
from d2o_server.settings import worker_settings
from tests.server.engine.moody_worker import MOOD
from tests.server.engine.streams import events, tokens, until_it_has

pytestmark = pytest.mark.asyncio(loop_scope="module")
IDS = map(str, itertools.count())
NONE = D2OConfig(policy=Policy.NONE)
TIGHT = D2OConfig(min_budget=1, ratio=0.3)
SETTINGS = worker_settings(
    model="random:tiny-llama", dtype="float32", device="cpu", threads=1, num_pages=400, check_integrity=True
)


@asynccontextmanager
async def workers(
    count: int, mood: Path, restarts: int, settings: WorkerSettings = SETTINGS
) -> AsyncIterator[Dispatcher]:
    quick = Supervision(worker_timeout=2, worker_restarts=restarts, first_pause=0.1, longest_pause=0.1)
    made = [
        Worker(
            index,
            settings,
            lambda _: None,
            {MOOD: str(mood), "OMP_NUM_THREADS": "1"},
            module="tests.server.engine.moody_worker",
            supervision=quick,
        )
        for index in range(count)
    ]
    await asyncio.gather(*(worker.start() for worker in made))
    try:
        yield Dispatcher(made, max_waiting=100, max_waiting_tokens=100_000)
        for worker in made:
            assert worker.waiting == {ticket.id: ticket for ticket in worker.tickets.values() if ticket.waiting}
    finally:
        await asyncio.gather(*(worker.stop() for worker in made))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mood(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mood") / "file"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one(mood: Path) -> AsyncIterator[Dispatcher]:
    """One worker for all the tests that leave it as it was."""
    async with workers(1, mood, restarts=8) as dispatcher:
        yield dispatcher


def request(config: D2OConfig = NONE, new: int = 300, **sampling: object) -> Submit:
    params: dict[str, object] = {"ignore_end_of_text": True} | sampling
    return Submit(
        id=next(IDS),
        prompt=tuple(range(3, 120)),
        sampling=SamplingParams(**params),  # type: ignore[arg-type]
        seed=5,
        config=config,
        end_ids=(),
        max_new_tokens=new,
    )


def feel(mood: Path, what: str) -> None:
    """What is wrong with the workers from now on; see :mod:`.moody_worker`."""
    mood.write_text(what)


def send(worker: Worker, number: signal.Signals) -> None:
    assert worker.pid is not None
    os.kill(worker.pid, number)


async def until_serving(worker: Worker) -> None:
    async with asyncio.timeout(60):
        while not worker.serving:
            await asyncio.sleep(0.02)


MIX = [
    request(),
    request(TIGHT),
    request(D2OConfig(budget_tokens=150)),
    request(TIGHT, temperature=1.0, repetition_penalty=1.2, logprobs=2),
    request(D2OConfig.of(Policy.SNAPKV, ratio=0.3, min_budget=1), temperature=1.0, top_p=0.9),
    # Too long for the full cache: another worker must not choose again.
    msgspec.structs.replace(request(TIGHT), auto=AutoTerms(full_tokens=1)),
]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_streams_go_on_where_they_were_when_their_worker_is_killed_or_stopped(
    one: Dispatcher, number: signal.Signals
) -> None:
    (worker,) = one.workers
    alone = [await events(one.submit(again(message), 60)) for message in MIX]
    tickets = [one.submit(again(message), 60) for message in MIX]
    waits = one.submit(request(new=3000), 400)
    await asyncio.gather(*(until_it_has(ticket, 20) for ticket in tickets))
    send(worker, number)
    # Its death is not known yet: what is sent now must neither block nor be forgotten.
    unaware = one.submit(request(new=5), 10)
    async with asyncio.timeout(10):
        while worker.serving:
            await asyncio.sleep(0.01)
    assert [ticket.waiting for ticket in tickets] == [True] * len(tickets)
    assert len(one.waiting) == len(tickets) + 2
    with pytest.raises(NoWorker, match=r"^no worker is serving at the moment; it is being restarted$"):
        one.submit(request(), 60)
    came = await asyncio.gather(*map(events, tickets))
    assert [tokens(each) for each in came] == [tokens(each) for each in alone]
    for each, before in zip(came, alone, strict=True):
        assert [type(event) for event in each] == [Admitted, *[NewToken] * 300, Ended]
        assert each[0] == _renamed(before[0], each[0])
        assert _fates(each[-1]) == _fates(before[-1])
    assert [ticket.resumed for ticket in tickets] == [1] * len(tickets)
    assert len(tokens(await events(unaware))) == 5
    one.release(waits)
    async with asyncio.timeout(5):
        while worker.pool is None or worker.pool.reserved:
            await asyncio.sleep(0.01)


def again(message: Submit) -> Submit:
    return Submit(**{name: getattr(message, name) for name in message.__struct_fields__} | {"id": next(IDS)})


def _renamed(event: TicketEvent, other: TicketEvent) -> TicketEvent:
    assert isinstance(event, Admitted)
    return Admitted(**{name: getattr(event, name) for name in event.__struct_fields__} | {"id": other.id})


def _fates(event: TicketEvent) -> object:
    assert isinstance(event, Ended)
    return [(layer.budget, layer.kept, layer.merged, layer.dropped) for layer in event.facts.layers]


async def test_a_short_stop_is_no_death(one: Dispatcher) -> None:
    (worker,) = one.workers
    before = worker.restarts
    ticket = one.submit(request(), 60)
    await until_it_has(ticket, 20)
    send(worker, signal.SIGSTOP)
    await asyncio.sleep(1)
    send(worker, signal.SIGCONT)
    assert len(tokens(await events(ticket))) == 300
    assert (ticket.resumed, worker.restarts) == (0, before)


async def test_a_worker_that_stands_still_is_noticed_though_it_has_nothing_to_do(one: Dispatcher) -> None:
    (worker,) = one.workers
    before = worker.restarts
    send(worker, signal.SIGSTOP)
    async with asyncio.timeout(10):
        while worker.restarts == before:
            await asyncio.sleep(0.02)
    # Nor is the next one, which is stopped before its heart beats.
    async with asyncio.timeout(10):
        while worker.pid is None:
            await asyncio.sleep(0.005)
    send(worker, signal.SIGSTOP)
    async with asyncio.timeout(10):
        while worker.restarts < before + 2:
            await asyncio.sleep(0.02)
    await until_serving(worker)


async def test_a_step_that_hangs_is_given_up_and_its_requests_are_not(one: Dispatcher, mood: Path) -> None:
    (worker,) = one.workers
    before = worker.restarts
    ticket = one.submit(request(TIGHT), 60)
    await until_it_has(ticket, 20)
    feel(mood, "hang")
    async with asyncio.timeout(10):
        while worker.restarts == before:
            await asyncio.sleep(0.02)
    feel(mood, "")
    came = await events(ticket)
    assert (len(tokens(came)), ticket.resumed) == (300, 1)


async def test_a_worker_that_has_lost_a_page_serves_what_it_has_and_starts_again_when_idle(tmp_path: Path) -> None:
    unchecked = msgspec.structs.replace(SETTINGS, check_integrity=False)
    async with workers(1, tmp_path / "file", restarts=1, settings=unchecked) as dispatcher:
        (worker,) = dispatcher.workers
        ticket = dispatcher.submit(request(), 60)
        await until_it_has(ticket, 20)
        feel(tmp_path / "file", "lose")
        async with asyncio.timeout(10):
            while worker.restarts == 0:
                await asyncio.sleep(0.02)
        feel(tmp_path / "file", "")
        assert len(tokens(await events(ticket))) == 300
        await until_serving(worker)
        assert len(tokens(await events(dispatcher.submit(request(), 60)))) == 300
        # The last report told all that the stream had, before the pool was looked at.
        assert (ticket.resumed, worker.restarts) == (0, 1)


async def test_a_stop_string_that_was_found_before_the_death_is_not_forgotten(one: Dispatcher) -> None:
    (worker,) = one.workers
    ticket = one.submit(request(TIGHT, new=2000), 300)
    await until_it_has(ticket, 30)
    send(worker, signal.SIGKILL)
    one.stop_string(ticket)
    last = (await events(ticket))[-1]
    assert isinstance(last, Ended)
    assert last.reason == "stop"
    assert len(ticket.output) < 2000


async def test_a_request_that_its_reader_leaves_meanwhile_is_not_resumed(one: Dispatcher) -> None:
    (worker,) = one.workers
    ticket = one.submit(request(), 60)
    await until_it_has(ticket, 20)
    send(worker, signal.SIGKILL)
    async with asyncio.timeout(10):
        while worker.serving:
            await asyncio.sleep(0.01)
    one.release(ticket)
    assert one.waiting == []
    await until_serving(worker)
    assert (one.waiting, one.running) == ([], 0)


async def test_the_request_that_kills_workers_ends_before_they_are_given_up(one: Dispatcher, mood: Path) -> None:
    (worker,) = one.workers
    before = worker.restarts
    ticket = one.submit(request(), 60)
    await until_it_has(ticket, 20)
    feel(mood, "die")
    last = (await events(ticket))[-1]
    feel(mood, "")
    assert isinstance(last, Failed)
    assert (last.error, last.message) == (
        "WorkerDied",
        "3 workers in a row died while they ran the request and brought it no further",
    )
    await until_serving(worker)
    # The first of the deaths came after progress.
    assert worker.restarts - before in (3, 4)
    assert len(tokens(await events(one.submit(request(new=5), 10)))) == 5


async def test_when_both_have_died_the_first_that_is_back_goes_on_with_everything(tmp_path: Path) -> None:
    async with workers(2, tmp_path / "mood", restarts=8) as both:
        first, second = both.workers
        alone = await events(both.submit(request(TIGHT), 60))
        tickets = [both.submit(request(TIGHT), 60) for _ in range(6)]
        await asyncio.gather(*(until_it_has(ticket, 10) for ticket in tickets))
        send(first, signal.SIGSTOP)
        send(second, signal.SIGKILL)
        # The first keeps its own until it counts as dead; it is to come back last.
        async with asyncio.timeout(30):
            while first.serving:
                await asyncio.sleep(0.01)
            while not (first.pid or first.serving):
                await asyncio.sleep(0.01)
            send(first, signal.SIGKILL)
        came = await asyncio.gather(*map(events, tickets))
        assert [tokens(each) for each in came] == [tokens(alone)] * 6
        assert {type(each[-1]) for each in came} == {Ended}


async def test_another_worker_goes_on_at_once_and_none_that_is_left_means_the_end(tmp_path: Path) -> None:
    mood = tmp_path / "mood"
    async with workers(2, mood, restarts=1) as both:
        tickets = [both.submit(request(TIGHT, new=1500), 300) for _ in range(2)]
        await asyncio.gather(*(until_it_has(ticket, 20) for ticket in tickets))
        first, second = both.workers
        assert {ticket.worker for ticket in tickets} == {first, second}
        feel(mood, "refuse")
        send(first, signal.SIGKILL)
        async with asyncio.timeout(2):
            while first.serving:
                await asyncio.sleep(0.005)
        assert {ticket.worker for ticket in tickets} == {second}
        came = await asyncio.gather(*map(events, tickets))
        assert tokens(came[0]) == tokens(came[1])
        assert sorted(ticket.resumed for ticket in tickets) == [0, 1]
        async with asyncio.timeout(60):
            while first.given_up is None:
                await asyncio.sleep(0.02)
        assert first.given_up == (
            "worker 0 is given up after 2 deaths in a row; the last: its process ended with status 4"
        )
        assert not both.lost.is_set()
        last = both.submit(request(new=3000), 60)
        await until_it_has(last, 5)
        send(second, signal.SIGKILL)
        began = time.monotonic()
        ended = (await events(last))[-1]
        assert isinstance(ended, Failed)
        assert ended.message == "no worker is left to run the request"
        assert both.lost.is_set()
        assert time.monotonic() - began < 30


async def test_a_worker_that_stops_ends_without_its_interpreter_taking_everything_down(tmp_path: Path) -> None:
    async with workers(1, tmp_path / "file", restarts=0) as dispatcher:
        (worker,) = dispatcher.workers
        assert worker.pid is not None
        process = psutil.Process(worker.pid)
    assert not process.is_running()
    assert not (tmp_path / "file.taken-down").exists()
