"""Two workers behind one server: both serve, and either can be lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from d2o_client import NO_RETRY, AsyncClient, AsyncStream, HealthStatus, InvalidArgumentError, Load
from tests.e2e.conftest import Launch
from tests.e2e.processes import PATIENCE, SLOW_TO_LOAD, TINY, ServerProcess, end, spawn, starting, workers_of

PAGES = 120
TWO_WORKERS = (*TINY, "--device", "cpu", "--data-parallel", "2")
# Three layers' pages of 32 slots: more than half of one worker's pool.
MORE_THAN_HALF = 800


@pytest.fixture(scope="module")
def server(launch_for_module: Launch) -> ServerProcess:
    """Replaces the package's own server."""
    return launch_for_module(*TWO_WORKERS, "--num-pages", str(PAGES))


async def load_when(client: AsyncClient, running: tuple[int, int]) -> Load:
    """The load once the workers run this many requests each."""
    async with asyncio.timeout(PATIENCE):
        while True:
            load = await client.load()
            if tuple(worker.running for worker in load.workers) == running:
                return load
            await asyncio.sleep(0.02)


def stream(client: AsyncClient, tokens: int) -> AsyncStream:
    return client.stream("x", max_new_tokens=tokens, ignore_end_of_text=True, compression="none")


async def test_requests_are_spread_over_workers_and_their_pools_add_up(client: AsyncClient) -> None:
    assert (await client.model_info()).total_pages == PAGES
    async with stream(client, MORE_THAN_HALF) as first, stream(client, MORE_THAN_HALF) as second:
        await asyncio.gather(anext(first), anext(second))
        load = await load_when(client, (1, 1))
        assert load.pages_total == 2 * PAGES
        assert [worker.pages_total for worker in load.workers] == [PAGES, PAGES]
        assert load.pages_free == sum(worker.pages_free for worker in load.workers)


async def test_a_request_that_no_single_worker_could_hold_is_refused(client: AsyncClient) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"requests of at most {PAGES} pages"):
        await client.generate("x", max_new_tokens=3500, compression="none")


async def test_the_streams_of_a_worker_that_dies_go_on_in_the_other(launch_server: Launch) -> None:
    server = launch_server(*TWO_WORKERS, "--num-pages", str(2 * PAGES))
    async with AsyncClient(server.target, retry=NO_RETRY) as client:
        streams = [stream(client, MORE_THAN_HALF) for _ in range(2)]
        await asyncio.gather(*map(anext, streams))
        await load_when(client, (1, 1))
        workers_of(server.process.pid)[0].kill()
        answers = await asyncio.gather(*(one.result() for one in streams))
        assert answers[0].token_ids == answers[1].token_ids
        assert sorted(answer.usage.resumed for answer in answers) == [0, 1]
        assert await client.health() is HealthStatus.SERVING
        assert (await client.generate("x", max_new_tokens=5, ignore_end_of_text=True)).usage.completion_tokens == 5
        async with asyncio.timeout(PATIENCE):
            while not all(worker.serving for worker in (await client.load()).workers):
                await asyncio.sleep(0.02)
    assert server.terminate() == 0


def test_one_worker_that_does_not_start_stops_all(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = spawn((*SLOW_TO_LOAD, "--data-parallel", "2", "--port", "0"), log)
    try:
        first, second = starting(process.pid, "worker", 2)
        second.kill()
        assert process.wait(PATIENCE) == 1
        first.wait(5)
    finally:
        end(process)
    *_, last = log.read_text().splitlines()
    assert " did not start: its process ended with status -9" in last
