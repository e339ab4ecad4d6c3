"""One model on two ranks: the answers of one process, and a worker that ends and comes back as a whole."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from d2o_client import NO_RETRY, AsyncClient, Compression, HealthStatus, Policy
from tests.e2e.conftest import Launch
from tests.e2e.processes import TINY, ServerProcess
from tests.e2e.test_startup import refusal
from tests.e2e.test_worker_death import health_when

TWO_RANKS = ("--device", "cpu", "--tensor-parallel", "2")
FLAGS = (*TINY, "--num-pages", "2000", "--prefill-tokens", "64")
PROMPT = "Once upon a time there was a cache. " * 20


@pytest.fixture(scope="module")
def split_server(launch_for_module: Launch) -> ServerProcess:
    return launch_for_module(*FLAGS, *TWO_RANKS)


@pytest.mark.parametrize("policy", [Policy.NONE, Policy.D2O])
async def test_answers_are_those_of_one_process(
    client: AsyncClient, split_server: ServerProcess, policy: Policy
) -> None:
    compression = Compression(policy=policy, ratio=0.3, min_budget=32)
    async with AsyncClient(split_server.target, retry=NO_RETRY) as split:
        expected, answer = await asyncio.gather(
            *(each.generate(PROMPT, max_new_tokens=60, seed=3, compression=compression) for each in (client, split))
        )
        whole, parts = await asyncio.gather(client.model_info(), split.model_info())
    assert answer.token_ids == expected.token_ids
    assert [(layer.budget, layer.kept) for layer in answer.cache.layers] == [
        (layer.budget, layer.kept) for layer in expected.cache.layers
    ]
    assert (parts.kv_heads, parts.page_bytes) == (whole.kv_heads, whole.page_bytes)


@pytest.mark.parametrize("killed", ["rank 1", "rank 0"])
async def test_a_rank_that_dies_takes_its_worker_along_which_comes_back(
    split_server: ServerProcess, killed: str
) -> None:
    leader = split_server.worker()
    (other,) = leader.children()
    async with AsyncClient(split_server.target, retry=NO_RETRY) as client:
        alone = await client.generate("x", max_new_tokens=300, ignore_end_of_text=True)
        stream = client.stream("x", max_new_tokens=300, ignore_end_of_text=True)
        await anext(stream)
        (other if killed == "rank 1" else leader).kill()
        await gone(leader, other)
        await health_when(client, HealthStatus.NOT_SERVING, 1)
        await health_when(client, HealthStatus.SERVING)
        answer = await stream.result()
        assert (answer.token_ids, answer.usage.resumed) == (alone.token_ids, 1)


async def gone(*processes: psutil.Process) -> None:
    async with asyncio.timeout(5):
        while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
            await asyncio.sleep(0.05)


def test_ranks_that_do_not_divide_the_heads_are_refused_and_leave_no_process(tmp_path: Path) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    *_, last = refusal(tmp_path, *FLAGS, "--device", "cpu", "--tensor-parallel", "3")
    assert last.startswith("d2o-serve: tensor_parallel: got 3, allowed is what divides the 4 query heads, 2 KV heads")
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


async def test_it_stops_when_it_is_told_to(split_server: ServerProcess) -> None:
    leader = split_server.worker()
    ranks = [leader, *leader.children()]
    assert len(ranks) == 2
    assert split_server.terminate() == 0
    await gone(*ranks)
