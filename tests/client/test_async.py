"""What only the asyncio client promises: tasks, cancellation and loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from d2o_client import AsyncClient, ClientClosedError, RequestCancelledError, RetryPolicy
from tests.client.conftest import Retries
from tests.client.scripted_service import HANG, LATER, PATIENCE, STARTED, Recorded, ScriptedServer, chunk


@pytest.fixture
async def client(server: ScriptedServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target, timeout=20) as running:
        yield running


async def arrival(server: ScriptedServer) -> Recorded:
    """The first call, once the server has seen it."""
    async with asyncio.timeout(PATIENCE):
        while not server.calls:
            await asyncio.sleep(0.01)
    return server.calls[0]


async def was_cancelled(call: Recorded) -> bool:
    return await asyncio.to_thread(call.cancelled.wait, PATIENCE)


async def test_a_stream_is_iterated_with_async_for(client: AsyncClient) -> None:
    assert [chunk.text async for chunk in client.stream("Hi")] == ["Hello", " world"]


async def test_cancelling_a_task_that_waits_for_an_answer_cancels_the_call(
    client: AsyncClient, server: ScriptedServer
) -> None:
    server.script("GenerateText", HANG)
    task = asyncio.create_task(client.generate("Hi"))
    call = await arrival(server)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await was_cancelled(call)


async def test_cancelling_a_task_that_reads_a_stream_cancels_the_call(
    client: AsyncClient, server: ScriptedServer
) -> None:
    server.script("StreamGenerateText", STARTED, chunk("a", 1), HANG)
    task = asyncio.create_task(client.stream("Hi").result())
    call = await arrival(server)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await was_cancelled(call)


async def test_a_task_is_cancelled_while_it_waits_for_its_next_attempt(
    client: AsyncClient, server: ScriptedServer, retries: Retries
) -> None:
    server.script("GenerateText", LATER)
    task = asyncio.create_task(client.generate("Hi"))
    await asyncio.to_thread(retries.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(server.calls) == 1


async def test_closing_a_stream_ends_its_wait_for_the_next_attempt(
    client: AsyncClient, server: ScriptedServer, retries: Retries
) -> None:
    server.script("StreamGenerateText", LATER)
    stream = client.stream("Hi")
    task = asyncio.create_task(stream.result())
    await asyncio.to_thread(retries.wait)
    await stream.aclose()
    with pytest.raises(RequestCancelledError, match="closed"):
        await asyncio.wait_for(task, PATIENCE)
    assert len(server.calls) == 1


async def test_closing_the_client_ends_every_wait_for_the_next_attempt(
    client: AsyncClient, server: ScriptedServer, retries: Retries
) -> None:
    server.script("GenerateText", LATER)
    server.script("StreamGenerateText", LATER)
    tasks = [asyncio.create_task(client.generate("Hi")), asyncio.create_task(client.stream("Hi").result())]
    await asyncio.to_thread(retries.wait, 2)
    await client.close()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE)
    assert [type(result) for result in results] == [ClientClosedError, ClientClosedError]


async def test_closing_a_stream_that_another_task_reads_is_no_task_cancellation(
    client: AsyncClient, server: ScriptedServer
) -> None:
    server.script("StreamGenerateText", STARTED, HANG)
    stream = client.stream("Hi")
    task = asyncio.create_task(stream.result())
    await arrival(server)
    await stream.aclose()
    with pytest.raises(RequestCancelledError):
        await task


async def test_closing_the_client_ends_what_still_runs(server: ScriptedServer) -> None:
    client = AsyncClient(server.target)
    server.script("GenerateText", HANG)
    server.script("StreamGenerateText", STARTED, chunk("a", 1), HANG)
    stream = client.stream("Hi")
    await anext(stream)
    tasks = [asyncio.create_task(client.generate("Hi")), asyncio.create_task(stream.result())]
    await asyncio.sleep(0.1)
    await client.close()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE)
    assert [type(result) for result in results] == [RequestCancelledError, RequestCancelledError]


async def test_a_closed_client_refuses_calls(client: AsyncClient) -> None:
    await client.close()
    with pytest.raises(ClientClosedError):
        await client.generate("Hi")
    with pytest.raises(ClientClosedError):
        await anext(client.stream("Hi"))


async def test_one_client_serves_many_streams_at_once(client: AsyncClient) -> None:
    results = await asyncio.gather(*(client.stream("Hi").result() for _ in range(50)))
    assert {result.text for result in results} == {"Hello world"}


def test_a_client_may_be_made_before_its_loop_but_not_moved_to_another(server: ScriptedServer) -> None:
    client = AsyncClient(server.target, retry=RetryPolicy(max_attempts=1))

    async def use() -> None:
        await client.load()

    with asyncio.Runner() as first:
        first.run(use())
        with asyncio.Runner() as second, pytest.raises(RuntimeError, match="another event loop"):
            second.run(use())
        first.run(client.close())
