"""SIGTERM: health first, then no new calls, and no stream that runs is cut."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

from d2o_client import NO_RETRY, AsyncClient, HealthStatus, UnavailableError
from tests.e2e.conftest import Launch
from tests.e2e.processes import PATIENCE, SLOW_TO_LOAD, TINY, end, spawn, starting
from tests.e2e.test_worker_death import health_when

FLAGS = (*TINY, "--num-pages", "1000", "--drain-window", "0.7")
TOKENS = 2400


async def test_a_drain_cuts_no_stream(launch_server: Launch) -> None:
    server = launch_server(*FLAGS)
    async with AsyncClient(server.target, retry=NO_RETRY) as client:
        running = client.stream("x", max_new_tokens=TOKENS, ignore_end_of_text=True)
        await anext(running)
        server.process.send_signal(signal.SIGTERM)
        await health_when(client, HealthStatus.NOT_SERVING, 1)
        # Balancers need a moment to notice: calls that still come are taken.
        late = await client.generate("y", max_new_tokens=5, ignore_end_of_text=True)
        assert late.usage.completion_tokens == 5
        await asyncio.sleep(0.9)
        with pytest.raises(UnavailableError, match=r"^the server is shutting down$"):
            await client.generate("z")
        assert (await client.load()).draining
        assert running.finished is None
        answer = await running.result()
        assert answer.usage.completion_tokens == len(answer.token_ids) == TOKENS
    assert server.process.wait(PATIENCE) == 0


async def test_a_drain_under_100_streams_cuts_none_and_ends_within_its_grace(launch_server: Launch) -> None:
    # So many tokens that the streams outlast the window on a fast machine, and end within the grace on a slow one.
    tokens = 700
    server = launch_server(*TINY, "--num-pages", "30000", "--drain-window", "1.5", "--drain-grace", "40")
    async with AsyncClient(server.target, retry=NO_RETRY) as client:
        streams = [client.stream("x" * (1 + i), max_new_tokens=tokens, ignore_end_of_text=True) for i in range(100)]
        await asyncio.gather(*map(anext, streams))
        server.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        reading = asyncio.gather(*(stream.result() for stream in streams))
        await health_when(client, HealthStatus.NOT_SERVING, 2)
        late = await client.generate("y", max_new_tokens=2, ignore_end_of_text=True)
        assert late.usage.completion_tokens == 2
        await asyncio.sleep(max(0.0, began + 2.0 - time.monotonic()))
        assert not reading.done(), f"all streams ended {time.monotonic() - began:.1f} s after SIGTERM"
        for _ in range(3):
            with pytest.raises(UnavailableError, match=r"^the server is shutting down$"):
                await client.generate("z")
        for answer in await reading:
            assert answer.usage.completion_tokens == len(answer.token_ids) == tokens
    assert server.process.wait(PATIENCE) == 0
    assert time.monotonic() - began < 1.5 + 40


async def test_calls_are_taken_until_the_window_ends_though_nothing_runs_any_more(launch_server: Launch) -> None:
    # Few enough tokens that they end far within the window on a slow machine, too.
    tokens = 500
    server = launch_server(*TINY, "--num-pages", "1000", "--drain-window", "8")
    async with AsyncClient(server.target, retry=NO_RETRY) as client:
        running = client.stream("x", max_new_tokens=tokens, ignore_end_of_text=True)
        await anext(running)
        server.process.send_signal(signal.SIGTERM)
        await health_when(client, HealthStatus.NOT_SERVING, 1)
        assert (await running.result()).usage.completion_tokens == tokens
        late = await client.generate("y", max_new_tokens=5, ignore_end_of_text=True)
        assert late.usage.completion_tokens == 5
    assert server.process.wait(15) == 0
    assert "draining: refusing new calls in 8.0 s, 60.0 s for running streams" in server.log.read_text()


def test_a_server_that_nobody_uses_ends_at_once(launch_server: Launch) -> None:
    server = launch_server(*FLAGS, "--drain-window", "300")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0
    log = server.log.read_text()
    assert "draining: nothing runs or waits" in log
    assert "refusing" not in log


async def test_a_drain_ends_after_its_grace(launch_server: Launch) -> None:
    server = launch_server(*FLAGS, "--drain-window", "0", "--drain-grace", "0.2")
    async with AsyncClient(server.target, retry=NO_RETRY) as client:
        running = client.stream("x", max_new_tokens=3000, ignore_end_of_text=True)
        await anext(running)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(UnavailableError):
            await running.result()
    assert server.process.wait(10) == 0


@pytest.mark.parametrize("stage", ["template", "worker"])
def test_it_can_be_stopped_while_it_starts(stage: str, tmp_path: Path) -> None:
    front = spawn((*SLOW_TO_LOAD, "--port", "0"), tmp_path / "log")
    try:
        (process,) = starting(front.pid, stage)
        front.send_signal(signal.SIGTERM)
        assert front.wait(5) == 0
        assert not process.is_running()
    finally:
        end(front)
    assert "Traceback" not in (tmp_path / "log").read_text()
