"""The engine over a real worker process, without gRPC: events, facts, deadlines, draining and closing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
import pytest_asyncio

from d2o.config import D2OConfig, Policy
from d2o_server.app import running_engine
from d2o_server.engine.engine import LocalEngine
from d2o_server.engine.types import (
    ChatMessage,
    Chunk,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    Started,
    Tokens,
)
from d2o_server.errors import DeadlineExceeded, Draining, InvalidRequest, WorkerDied
from d2o_server.settings import Settings, worker_settings

pytestmark = pytest.mark.asyncio(loop_scope="module")
SETTINGS = Settings(
    worker=worker_settings(
        model="random:tiny-llama", dtype="float32", threads=1, num_pages=500, prefill_tokens=64, check_integrity=True
    )
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[LocalEngine]:
    async with running_engine(SETTINGS, lambda _: None) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def nothing_is_left(engine: LocalEngine) -> AsyncIterator[None]:
    yield
    async with asyncio.timeout(5):
        while (load := engine.load()).pages_used or load.pages_reserved or load.running or load.waiting:
            await asyncio.sleep(0.01)


FULL_CACHE = D2OConfig(policy=Policy.NONE)


def request(prompt: Any = "Once upon a time", deadline: float | None = None, **sampling: Any) -> GenerationRequest:
    params = SamplingParams(**({"max_new_tokens": 10, "ignore_end_of_text": True} | sampling))
    return GenerationRequest(prompt=prompt, sampling=params, deadline=deadline, compression=FULL_CACHE)


async def events(engine: LocalEngine, wanted: GenerationRequest) -> list[Event]:
    async with aclosing(engine.generate(wanted)) as stream:
        return [event async for event in stream]


async def test_events_come_in_order(engine: LocalEngine) -> None:
    started, *chunks, finished = await events(engine, request())
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert all(isinstance(chunk, Chunk) for chunk in chunks)
    assert sum(len(chunk.token_ids) for chunk in chunks if isinstance(chunk, Chunk)) == 10
    assert (finished.reason, finished.usage.completion_tokens) == (FinishReason.LENGTH, 10)
    assert finished.usage.prompt_tokens == started.prompt_tokens == 16


@pytest.mark.parametrize("stage", [0, 1, 5])
async def test_leaving_the_stream_frees_what_it_holds(engine: LocalEngine, stage: int) -> None:
    stream = engine.generate(request(max_new_tokens=2000))
    for _ in range(stage):
        await anext(stream)
    await stream.aclose()
    # The rest is the fixture's to check.


async def test_cancelling_the_reader_frees_what_it_holds(engine: LocalEngine) -> None:
    reading = asyncio.ensure_future(events(engine, request("x" * 3000, max_new_tokens=500)))
    async with asyncio.timeout(5):
        while not engine.load().pages_used:
            await asyncio.sleep(0.005)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert engine.load().running == 0


async def test_a_deadline_is_kept_before_and_while_it_runs(engine: LocalEngine) -> None:
    with pytest.raises(DeadlineExceeded, match=r"^the deadline had passed when the request arrived$"):
        await events(engine, request(deadline=time.monotonic() - 1))
    with pytest.raises(DeadlineExceeded, match=r"^the deadline passed while the request was running$"):
        await events(engine, request(max_new_tokens=3000, deadline=time.monotonic() + 0.3))


async def test_a_deadline_is_kept_in_the_queue(engine: LocalEngine) -> None:
    whole_pool = engine.generate(request(max_new_tokens=3900))
    await anext(whole_pool)
    with pytest.raises(DeadlineExceeded, match=r"^the deadline passed while the request was queued$"):
        await events(engine, request(max_new_tokens=3900, deadline=time.monotonic() + 0.2))
    await whole_pool.aclose()


async def test_a_slow_reader_gets_the_rest_in_one_chunk(engine: LocalEngine) -> None:
    stream = engine.generate(request(max_new_tokens=50))
    assert isinstance(await anext(stream), Started)
    async with asyncio.timeout(10):
        while engine.load().running:
            await asyncio.sleep(0.01)
    chunk, finished = [event async for event in stream]
    assert isinstance(chunk, Chunk)
    assert len(chunk.token_ids) == 50
    assert isinstance(finished, Finished)


async def test_what_piles_up_while_the_front_is_behind_goes_out_in_one_chunk_a_stream(engine: LocalEngine) -> None:
    streams = [engine.generate(request(max_new_tokens=60)) for _ in range(4)]
    await asyncio.gather(*map(anext, streams))
    time.sleep(1.5)  # noqa: ASYNC251  the worker goes on while this loop stands still
    for stream in streams:
        chunks = [event async for event in stream if isinstance(event, Chunk)]
        assert sum(len(chunk.token_ids) for chunk in chunks) == 60
        assert max(len(chunk.token_ids) for chunk in chunks) > 10
        assert len(chunks) < 30


@pytest.mark.parametrize(
    ("prompt", "field"),
    [("", "prompt.text"), ((), "prompt.tokens"), ((512,), "prompt.tokens.ids"), ((-1,), "prompt.tokens.ids")],
)
async def test_a_prompt_that_cannot_be_taken_is_refused(engine: LocalEngine, prompt: Any, field: str) -> None:
    for refused in (events(engine, request(prompt)), engine.tokenize(prompt)):
        with pytest.raises(InvalidRequest) as raised:
            await refused
        assert raised.value.field == field


async def test_texts_of_tokens_are_made_off_the_event_loop(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()

    def token_text(token_id: int) -> str:
        threads.add(threading.get_ident())
        return f"<{token_id}>"

    monkeypatch.setattr(engine._codec, "token_text", token_text)
    assert await engine.tokenize((5, 7), with_text=True) == Tokens((5, 7), ("<5>", "<7>"))
    assert threads
    assert threading.get_ident() not in threads


async def test_a_conversation_is_tokenized_with_the_template(engine: LocalEngine) -> None:
    tokens = await engine.tokenize((ChatMessage("user", "Hi"),), with_text=True)
    assert "".join(tokens.texts).startswith("<|im_start|>user\nHi")


async def test_draining_lets_streams_finish_and_closing_ends_them() -> None:
    async with running_engine(SETTINGS, lambda _: None) as engine:
        running = asyncio.ensure_future(events(engine, request(max_new_tokens=200)))
        endless = asyncio.ensure_future(events(engine, request(max_new_tokens=3000)))
        async with asyncio.timeout(5):
            while engine.load().running < 2:
                await asyncio.sleep(0.01)
        draining = asyncio.ensure_future(engine.drain(60))
        await asyncio.sleep(0)
        assert not engine.serving
        assert engine.load().draining
        with pytest.raises(Draining):
            await events(engine, request())
        assert isinstance((await running)[-1], Finished)
        assert not draining.done()
        began = time.monotonic()
        await engine.drain(0.1)
        assert 0.05 < time.monotonic() - began < 2
        draining.cancel()
    with pytest.raises(WorkerDied):
        await endless
