"""The short version of benchmarks/chaos.py: no token lost or doubled while workers are killed, stopped and starved."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import psutil

from benchmarks import chaos
from d2o_client import NO_RETRY, AsyncClient
from tests.e2e.conftest import Launch
from tests.e2e.processes import TINY


def test_streams_are_whole_while_workers_are_killed_and_stopped(tmp_path: Path) -> None:
    size = ("--requests", "400", "--kills", "5", "--kinds", "30", "--at-once", "32")
    result = chaos.main([*size, "--threads", "2", "--stopped", "0.4", "--out", str(tmp_path)])
    assert result["wrong"] == []
    assert not any(result["left_over"].values())
    assert result["sound"]
    assert sum(result["signals"].values()) >= 4
    assert sum(count for times, count in result["resumed"].items() if times != "0") > 0
    assert (tmp_path / "chaos.json").exists()


async def test_a_starved_worker_is_slow_and_not_dead(launch_server: Launch) -> None:
    """Its processor is taken from it by others of higher priority, and it stops now and then."""
    server = launch_server(*TINY, "--num-pages", "1000", "--worker-timeout", "3")
    worker = server.worker()
    cores = sorted(os.sched_getaffinity(0))
    worker.cpu_affinity(cores[:1])
    worker.nice(19)
    spinning = [await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass") for _ in range(3)]
    try:
        for process in spinning:
            psutil.Process(process.pid).cpu_affinity(cores[:1])
        async with AsyncClient(server.target, retry=NO_RETRY) as client:
            reading = asyncio.ensure_future(client.generate("x", max_new_tokens=60, ignore_end_of_text=True))
            give_up = time.monotonic() + 6
            while not reading.done() and time.monotonic() < give_up:
                worker.suspend()
                await asyncio.sleep(0.7)
                worker.resume()
                await asyncio.sleep(0.3)
            for process in spinning:
                process.kill()
            answer = await reading
            assert (answer.usage.completion_tokens, answer.usage.resumed) == (60, 0)
            assert [one.restarts for one in (await client.load()).workers] == [0]
    finally:
        for process in spinning:
            if process.returncode is None:
                process.kill()
            await process.wait()
    assert server.terminate() == 0
