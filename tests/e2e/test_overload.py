"""More than the server can take now: RESOURCE_EXHAUSTED, with word on when to come back."""

from __future__ import annotations

import asyncio

import pytest

from d2o_client import AsyncClient, Generation, ResourceExhaustedError, RetryPolicy
from tests.e2e.processes import ServerProcess
from tests.e2e.test_endings import MOST, load_when


def pushback_of(error: ResourceExhaustedError) -> int:
    return int(error.trailers["grpc-retry-pushback-ms"])


async def test_a_full_queue_refuses_and_says_when_to_come_back(small_client: AsyncClient) -> None:
    calls = [asyncio.ensure_future(small_client.generate("x" * 50, **MOST)) for _ in range(3)]  # type: ignore[arg-type]
    await load_when(small_client, lambda load: (load.running, load.waiting) == (1, 2))
    with pytest.raises(ResourceExhaustedError, match=r"^the queue is full \(2 requests wait\); try again in") as full:
        await small_client.generate("x")
    assert 100 <= pushback_of(full.value) <= 30_000
    assert full.value.retry_after == pushback_of(full.value) / 1000
    answers = await asyncio.gather(*calls)
    assert [answer.usage.completion_tokens for answer in answers] == [350] * 3


async def test_a_queue_that_is_full_of_prompt_tokens_refuses(small_client: AsyncClient) -> None:
    calls = []
    for length in (50, 350):
        call = small_client.generate("x" * length, max_new_tokens=250, ignore_end_of_text=True, compression="none")
        calls.append(asyncio.ensure_future(call))
        await load_when(small_client, lambda load: load.running == 1)
    await load_when(small_client, lambda load: load.waiting_prompt_tokens == 350)
    with pytest.raises(ResourceExhaustedError, match=r"^the queue is full \(350 prompt tokens wait\)"):
        await small_client.generate("x" * 200)
    fits = asyncio.ensure_future(small_client.generate("x" * 100, max_new_tokens=2, ignore_end_of_text=True))
    answers = await asyncio.gather(*calls, fits)
    assert [answer.usage.completion_tokens for answer in answers] == [250, 250, 2]


async def test_a_client_that_heeds_the_pushback_gets_its_turn(small_server: ServerProcess) -> None:
    patient = RetryPolicy(max_attempts=100)
    async with AsyncClient(small_server.target, retry=patient, timeout=60) as client:
        answers: list[Generation] = await asyncio.gather(
            *(client.generate("x" * 50, **(MOST | {"max_new_tokens": 300})) for _ in range(6))  # type: ignore[arg-type]
        )
    assert [answer.usage.completion_tokens for answer in answers] == [300] * 6
