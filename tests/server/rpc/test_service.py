"""Generation over a real channel: events in order, facts intact, and the caller's going away."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

import grpc
import pytest

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.server.rpc.conftest import Serve
from tests.server.rpc.scripted_engine import CHUNKS, FINISHED, LOAD, MODEL, STARTED, ScriptedEngine

STREAM = pb.StreamGenerateTextRequest(prompt=pb.Prompt(text="hello"))
UNARY = pb.GenerateTextRequest(prompt=pb.Prompt(text="hello"))


async def until(condition: Callable[[], bool]) -> float:
    """Seconds until ``condition`` holds; fails after 2."""
    began = time.perf_counter()
    async with asyncio.timeout(2):
        while not condition():
            await asyncio.sleep(0.001)
    return time.perf_counter() - began


async def test_a_stream_is_one_started_then_chunks_then_one_finished(serve: Serve) -> None:
    stub = InferenceServiceStub(await serve(ScriptedEngine()))
    messages = [message async for message in stub.StreamGenerateText(STREAM)]
    kinds = [message.WhichOneof("event") for message in messages]
    assert kinds == ["started", "chunk", "chunk", "chunk", "finished"]
    assert messages[0].started.generation_id == STARTED.generation_id
    assert [message.chunk.text for message in messages[1:4]] == [chunk.text for chunk in CHUNKS]
    assert messages[4].finished.stop_string == FINISHED.stop_string


async def test_a_unary_answer_is_the_stream_put_together(serve: Serve) -> None:
    stub = InferenceServiceStub(await serve(ScriptedEngine()))
    stream = [message async for message in stub.StreamGenerateText(STREAM)]
    answer = await stub.GenerateText(UNARY)
    assert answer.text == "".join(message.chunk.text for message in stream)
    assert list(answer.token_ids) == [token for message in stream for token in message.chunk.token_ids]
    assert list(answer.logprobs) == [entry for message in stream for entry in message.chunk.logprobs]
    assert answer.started == stream[0].started
    assert answer.finished == stream[-1].finished


async def test_tokenize_returns_texts_only_where_asked(serve: Serve) -> None:
    stub = InferenceServiceStub(await serve(ScriptedEngine()))
    prompt = pb.Prompt(text="four")
    assert await stub.Tokenize(pb.TokenizeRequest(prompt=prompt)) == pb.TokenizeResponse(token_ids=range(4))
    with_text = await stub.Tokenize(pb.TokenizeRequest(prompt=prompt, with_text=True))
    assert list(with_text.tokens) == ["0", "1", "2", "3"]


async def test_model_info_and_load_are_the_engines(serve: Serve) -> None:
    stub = InferenceServiceStub(await serve(ScriptedEngine()))
    info = await stub.GetModelInfo(pb.GetModelInfoRequest())
    load = await stub.GetLoad(pb.GetLoadRequest())
    assert (info.model, info.page_bytes, info.max_logprobs) == (MODEL.model, MODEL.page_bytes, MODEL.max_logprobs)
    assert (load.pages_free, load.draining, load.workers[0].index) == (LOAD.pages_free, True, 1)


async def test_streams_and_layers_come_where_they_are_asked_for(serve: Serve) -> None:
    stub = InferenceServiceStub(await serve(ScriptedEngine()))
    load = await stub.GetLoad(pb.GetLoadRequest(max_streams=2, with_layers=True))
    assert [stream.generation_id for stream in load.streams] == ["gen-0", "gen-1"]
    assert [layer.slots for layer in load.layers] == [800, 25]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.GetLoad(pb.GetLoadRequest(max_streams=1025))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details() == "max_streams: got 1025 streams, allowed is at most 1024"


async def test_the_callers_deadline_and_request_id_reach_the_engine(serve: Serve) -> None:
    engine = ScriptedEngine()
    stub = InferenceServiceStub(await serve(engine))
    await stub.GenerateText(UNARY, timeout=30, metadata=(("x-request-id", "caller-1"),))
    await stub.GenerateText(UNARY)
    with_deadline, without = engine.requests
    assert with_deadline.deadline == pytest.approx(time.monotonic() + 30, abs=2)
    assert with_deadline.client_id == "caller-1"
    assert (without.deadline, without.client_id) == (None, None)


async def test_a_refused_request_never_reaches_the_engine(serve: Serve) -> None:
    engine = ScriptedEngine()
    stub = InferenceServiceStub(await serve(engine))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.GenerateText(pb.GenerateTextRequest())
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details() == "prompt: got nothing, allowed is one of text, tokens or chat"
    assert engine.requests == []


@pytest.mark.parametrize("script", [(60.0,), (STARTED, 60.0), (STARTED, CHUNKS[0], 60.0)])
async def test_cancelling_a_stream_between_events_closes_the_generation_at_once(
    serve: Serve, script: tuple[object, ...]
) -> None:
    engine = ScriptedEngine(script)  # type: ignore[arg-type]
    call = InferenceServiceStub(await serve(engine)).StreamGenerateText(STREAM)
    for _ in script[:-1]:
        await call.read()
    await until(lambda: len(engine.requests) == 1)
    call.cancel()
    assert await until(lambda: engine.ended == 1) < 0.5
    assert await call.code() is grpc.StatusCode.CANCELLED


async def test_cancelling_a_unary_call_closes_the_generation(serve: Serve) -> None:
    engine = ScriptedEngine((STARTED, 60.0))
    call = InferenceServiceStub(await serve(engine)).GenerateText(UNARY)
    await until(lambda: len(engine.requests) == 1)
    call.cancel()
    assert await until(lambda: engine.ended == 1) < 0.5


async def test_a_reader_that_stops_reading_holds_the_generation_back_and_cancelling_frees_it(serve: Serve) -> None:
    text = "x" * 65536
    engine = ScriptedEngine((STARTED, *[type(CHUNKS[0])(text, (1,))] * 1000, FINISHED))
    call = InferenceServiceStub(await serve(engine)).StreamGenerateText(STREAM)
    await call.read()
    await asyncio.sleep(0.2)
    assert engine.ended == 0
    call.cancel()
    assert await until(lambda: engine.ended == 1) < 0.5


@pytest.mark.parametrize("method", ["GenerateText", "StreamGenerateText"])
async def test_a_deadline_that_passes_ends_the_call_and_the_generation(serve: Serve, method: str) -> None:
    engine = ScriptedEngine((STARTED, 60.0))
    stub = InferenceServiceStub(await serve(engine))
    request = UNARY if method == "GenerateText" else STREAM
    call = getattr(stub, method)(request, timeout=0.1)
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await until(lambda: engine.ended == 1) < 0.5


async def test_callers_that_leave_at_random_moments_leave_nothing_behind(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ScriptedEngine((STARTED, *CHUNKS * 40, FINISHED))
    stub = InferenceServiceStub(await serve(engine))
    moments = random.Random(7)

    async def call_and_leave() -> None:
        call = stub.StreamGenerateText(STREAM)
        for _ in range(moments.randrange(60)):
            await call.read()
        call.cancel()

    await asyncio.gather(*(call_and_leave() for _ in range(200)))
    await until(lambda: engine.ended == len(engine.requests))
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    assert (await stub.GenerateText(UNARY)).started.seed == STARTED.seed
