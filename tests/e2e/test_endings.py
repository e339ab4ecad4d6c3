"""Every way in which a request ends early, in every state: the caller's status, and pages that come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from d2o_client import AsyncClient, AsyncStream, DeadlineExceededError, InvalidArgumentError, Load

ENDLESS = 3000  # several seconds of tokens
# Three layers' pages for half of the small server's pool and more: a second such request waits.
MOST = {"max_new_tokens": 350, "ignore_end_of_text": True, "compression": "none"}


async def load_when(client: AsyncClient, condition: Callable[[Load], bool], seconds: float = 5) -> Load:
    """The first load that satisfies ``condition``."""
    async with asyncio.timeout(seconds):
        while not condition(load := await client.load()):
            await asyncio.sleep(0.005)
    return load


def idle(load: Load) -> bool:
    return not (load.pages_used or load.pages_reserved or load.running or load.waiting)


async def step_seconds(client: AsyncClient) -> float:
    """What one decode step takes at the moment."""
    usage = (await client.generate("x", max_new_tokens=30, ignore_end_of_text=True)).usage
    return (usage.total_seconds - usage.first_token_seconds) / 29


def endless(client: AsyncClient, timeout: float | None = None, prompt: str = "x") -> AsyncStream:
    return client.stream(prompt, max_new_tokens=ENDLESS, ignore_end_of_text=True, compression="none", timeout=timeout)


async def test_a_stream_cancelled_while_it_decodes_frees_its_pages_within_a_step(client: AsyncClient) -> None:
    step = await step_seconds(client)
    async with endless(client) as stream:
        await anext(stream)
        await load_when(client, lambda load: load.running == 1)
    left = time.perf_counter()
    await load_when(client, idle)
    # Generous, for a machine that does other things; the rest of the answer would take 3000 steps.
    assert time.perf_counter() - left < 100 * step


async def test_a_stream_cancelled_while_its_prompt_is_read_frees_its_pages(client: AsyncClient) -> None:
    async with client.stream("x" * 4000, max_new_tokens=50, ignore_end_of_text=True) as stream:
        reading = asyncio.ensure_future(anext(stream))
        load = await load_when(client, lambda load: load.pages_used > 0)
        assert stream.token_ids == ()
        assert load.pages_used < 3 * 125
        reading.cancel()
    await load_when(client, idle)


async def test_a_queued_request_that_is_cancelled_leaves_the_queue(small_client: AsyncClient) -> None:
    async with small_client.stream("x" * 50, **MOST) as running:  # type: ignore[arg-type]
        await anext(running)
        async with small_client.stream("y" * 50, **MOST) as queued:  # type: ignore[arg-type]
            reading = asyncio.ensure_future(anext(queued))
            load = await load_when(small_client, lambda load: load.waiting == 1)
            assert (load.running, load.waiting_prompt_tokens) == (1, 50)
            reading.cancel()
        await load_when(small_client, lambda load: load.waiting == 0)
        assert queued.started is None
        assert (await running.result()).usage.completion_tokens == 350


async def test_an_answer_that_was_finished_but_never_read_frees_its_pages_at_once(client: AsyncClient) -> None:
    stream = client.stream("x", max_new_tokens=50, ignore_end_of_text=True)
    await anext(stream)
    await load_when(client, lambda load: load.pages_used == load.pages_reserved == 0)
    await stream.aclose()


async def test_a_request_that_is_cancelled_before_it_is_tokenized_leaves_nothing(client: AsyncClient) -> None:
    calls = [asyncio.ensure_future(client.generate("x" * 200_000)) for _ in range(4)]
    await asyncio.sleep(0.02)
    for call in calls:
        call.cancel()
    results = await asyncio.gather(*calls, return_exceptions=True)
    # A quick machine has tokenized, and refused, some before they are cancelled.
    assert {type(result) for result in results} <= {asyncio.CancelledError, InvalidArgumentError}
    await load_when(client, idle)


async def test_a_deadline_that_passes_while_it_runs_ends_it(client: AsyncClient) -> None:
    stream = endless(client, timeout=0.4)
    began = time.perf_counter()
    with pytest.raises(DeadlineExceededError):
        await stream.result()
    assert 0.3 < time.perf_counter() - began < 2
    assert stream.token_ids
    await load_when(client, idle)


async def test_a_deadline_that_passes_in_the_queue_ends_it(small_client: AsyncClient) -> None:
    async with small_client.stream("x" * 50, **MOST) as running:  # type: ignore[arg-type]
        await anext(running)
        with pytest.raises(DeadlineExceededError):
            await small_client.generate("y" * 50, timeout=0.2, **MOST)  # type: ignore[arg-type]
        await load_when(small_client, lambda load: load.waiting == 0)
        assert (await running.result()).usage.completion_tokens == 350


async def test_what_waits_runs_as_soon_as_pages_come_back(small_client: AsyncClient) -> None:
    first = small_client.stream("x" * 50, **MOST)  # type: ignore[arg-type]
    await anext(first)
    second = asyncio.ensure_future(small_client.generate("y" * 50, **MOST))  # type: ignore[arg-type]
    await load_when(small_client, lambda load: load.waiting == 1)
    await first.aclose()
    answer = await second
    assert answer.usage.completion_tokens == 350
    assert answer.usage.queue_seconds > 0
