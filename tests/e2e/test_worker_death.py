"""Processes that are killed: the worker, and the front before its worker."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from d2o_client import NO_RETRY, AsyncClient, AsyncStream, HealthStatus, UnavailableError
from tests.e2e.conftest import Launch
from tests.e2e.processes import PATIENCE, SLOW_TO_LOAD, TINY, ServerProcess, end, spawn, starting, workers_of

# Seconds of tokens on a slow machine.
TOKENS = 800
FLAGS = (*TINY, "--num-pages", "1000", "--drain-window", "30")


async def stream_that_runs(client: AsyncClient) -> AsyncStream:
    stream = client.stream("x", max_new_tokens=TOKENS, ignore_end_of_text=True)
    await anext(stream)
    return stream


async def health_when(client: AsyncClient, wanted: HealthStatus, seconds: float = PATIENCE) -> float:
    """Seconds until the server's health is ``wanted``."""
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        while await client.health() is not wanted:
            await asyncio.sleep(0.02)
    return time.monotonic() - began


async def test_a_killed_worker_is_replaced_and_its_streams_go_on(launch_server: Launch) -> None:
    server = launch_server(*FLAGS)
    async with AsyncClient(server.target, retry=NO_RETRY) as client:
        alone = await client.generate("x", max_new_tokens=TOKENS, ignore_end_of_text=True)
        assert alone.usage.resumed == 0
        running = await stream_that_runs(client)
        queued = asyncio.ensure_future(client.generate("y" * 3500, max_new_tokens=100))
        await asyncio.sleep(0.05)
        # The one that replaces it dies as well, before it has connected: this waits for it meanwhile.
        killing = asyncio.create_task(asyncio.to_thread(kill_with_its_successor, server))
        await health_when(client, HealthStatus.NOT_SERVING, 1)
        with pytest.raises(
            UnavailableError, match=r"^no worker is serving at the moment; it is being restarted$"
        ) as refused:
            await client.generate("x")
        assert refused.value.retry_after == 1
        await killing
        await health_when(client, HealthStatus.SERVING)
        answer = await running.result()
        assert (answer.token_ids, answer.text, answer.usage.resumed) == (alone.token_ids, alone.text, 1)
        assert (await queued).usage.completion_tokens > 0
        assert [worker.restarts for worker in (await client.load()).workers] == [2]
    # Nothing runs, so that the drain window is not waited for.
    began = time.monotonic()
    assert server.terminate() == 0
    assert time.monotonic() - began < 5
    assert "worker 0: its process ended with status -9" in server.log.read_text()


async def test_streams_are_not_cut_by_a_death_in_a_drain(launch_server: Launch) -> None:
    server = launch_server(*TINY, "--num-pages", "1000", "--drain-window", "0.2")
    async with AsyncClient(server.target, retry=NO_RETRY) as client:
        running = await stream_that_runs(client)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        server.worker().kill()
        assert await client.health() is HealthStatus.NOT_SERVING
        answer = await running.result()
        assert (answer.usage.completion_tokens, answer.usage.resumed) == (TOKENS, 1)
    assert server.process.wait(PATIENCE) == 0


async def test_a_server_without_workers_ends_and_says_why(launch_server: Launch) -> None:
    server = launch_server(*TINY, "--num-pages", "1000", "--worker-restarts", "0")
    async with AsyncClient(server.target, retry=NO_RETRY) as client:
        running = await stream_that_runs(client)
        server.worker().kill()
        with pytest.raises(UnavailableError, match=r"^no worker is left to run the request$"):
            await running.result()
    assert server.process.wait(10) == 1
    *_, last = server.log.read_text().splitlines()
    assert last.startswith("d2o-serve: worker 0 is given up after 1 deaths in a row; the last: its process ended with")


def kill_with_its_successor(server: ServerProcess) -> None:
    """Kills the worker, and the one that is started for it within 10 ms of its start, long before it serves."""
    worker = server.worker()
    worker.kill()
    deadline = time.monotonic() + PATIENCE
    while not (started := [each for each in workers_of(server.process.pid) if each != worker]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started[0].kill()


async def test_a_worker_goes_with_its_front(launch_server: Launch) -> None:
    server = launch_server(*FLAGS)
    worker = server.worker()
    async with AsyncClient(server.target, retry=NO_RETRY) as client:
        stream = await stream_that_runs(client)
        server.process.kill()
        with pytest.raises(UnavailableError):
            await stream.result()
    worker.wait(5)


@pytest.mark.parametrize("stage", ["template", "worker"])
def test_a_worker_that_is_still_loading_goes_with_its_front(
    stage: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    front = spawn((*SLOW_TO_LOAD, "--port", "0"), tmp_path_factory.mktemp("server") / "log")
    try:
        (process,) = starting(front.pid, stage)
        front.kill()
        process.wait(5)
    finally:
        end(front)
