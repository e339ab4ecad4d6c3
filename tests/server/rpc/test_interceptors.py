"""What surrounds a call: its line in the access log, the bound on calls at once, bytes that are no message."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import time
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from d2o_server.engine.types import Event, GenerationRequest
from d2o_server.errors import DeadlineExceeded, Overloaded
from d2o_server.rpc.interceptors import CallInterceptor, CallRecord
from tests.server.rpc.conftest import Serve
from tests.server.rpc.scripted_engine import CHUNKS, FINISHED, STARTED, ScriptedEngine

SECRET = "a prompt that nobody else may read"
STREAM = pb.StreamGenerateTextRequest(prompt=pb.Prompt(text=SECRET))
UNARY = pb.GenerateTextRequest(prompt=pb.Prompt(text=SECRET))


@pytest.fixture
def access(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="d2o_server.access")
    return caplog


async def access_lines(access: pytest.LogCaptureFixture, count: int = 1) -> list[dict[str, str]]:
    """The access log's lines as pairs, once there are ``count`` of them."""
    async with asyncio.timeout(2):
        while True:
            lines = [record.getMessage() for record in access.records if record.name == "d2o_server.access"]
            if len(lines) >= count:
                return [dict(pair.split("=", 1) for pair in re.findall(r'\S+="[^"]*"|\S+', line)) for line in lines]
            await asyncio.sleep(0.002)


async def test_a_finished_generation_is_one_line_of_facts(serve: Serve, access: pytest.LogCaptureFixture) -> None:
    stub = InferenceServiceStub(await serve(ScriptedEngine()))
    await stub.GenerateText(UNARY, metadata=(("x-request-id", "caller-1"),))
    (line,) = await access_lines(access)
    assert float(line.pop("seconds")) < 5
    assert line == {
        "method": "GenerateText",
        "status": "OK",
        "generation": "gen-7",
        "request": "caller-1",
        "prompt_tokens": "5",
        "completion_tokens": "4",
        "queue_seconds": "0.25",
        "first_token_seconds": "0.5",
    }


async def test_prompts_and_answers_are_never_logged(serve: Serve, access: pytest.LogCaptureFixture) -> None:
    access.set_level(logging.DEBUG)
    stub = InferenceServiceStub(await serve(ScriptedEngine((STARTED, *CHUNKS, RuntimeError("defect")))))
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.GenerateText(UNARY)
    await access_lines(access)
    assert SECRET not in access.text
    assert "is \N{SNOWMAN}" not in access.text


async def test_a_cancelled_stream_is_logged_with_the_tokens_it_had(
    serve: Serve, access: pytest.LogCaptureFixture
) -> None:
    call = InferenceServiceStub(await serve(ScriptedEngine((STARTED, *CHUNKS, 60.0)))).StreamGenerateText(STREAM)
    for _ in range(4):
        await call.read()
    call.cancel()
    (line,) = await access_lines(access)
    assert (line["status"], line["completion_tokens"]) == ("CANCELLED", "4")


async def test_a_deadline_that_passed_is_told_apart_from_a_cancel(
    serve: Serve, access: pytest.LogCaptureFixture
) -> None:
    call = InferenceServiceStub(await serve(ScriptedEngine((STARTED, 60.0)))).StreamGenerateText(STREAM, timeout=0.1)
    await call.code()
    (line,) = await access_lines(access)
    assert line["status"] == "DEADLINE_EXCEEDED"


async def test_a_refusal_does_not_keep_its_request_in_memory(serve: Serve) -> None:
    refusal = Overloaded("full", 250)
    stub = InferenceServiceStub(await serve(ScriptedEngine((refusal,))))
    assert await stub.GenerateText(UNARY).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (refusal.__traceback__, refusal.__context__) == (None, None)


def test_a_callers_id_cannot_forge_a_line() -> None:
    line = CallRecord("GetLoad", client_id='x" status=OK\nmethod=forged').line()
    assert "\n" not in line
    assert json.dumps('x" status=OK\nmethod=forged') in line


async def test_a_long_request_id_is_cut(serve: Serve, access: pytest.LogCaptureFixture) -> None:
    stub = InferenceServiceStub(await serve(ScriptedEngine()))
    await stub.GetLoad(pb.GetLoadRequest(), metadata=(("x-request-id", "i" * 4000),))
    (line,) = await access_lines(access)
    assert line["request"] == "i" * 128


@pytest.mark.parametrize("method", ["GenerateText", "StreamGenerateText"])
async def test_bytes_that_are_no_message_are_the_callers_error(serve: Serve, method: str) -> None:
    channel: Any = await serve(ScriptedEngine())
    path = f"/d2o_inference.v1.InferenceService/{method}"
    call = (
        channel.unary_stream(path)(b"\xff\xff") if method.startswith("Stream") else channel.unary_unary(path)(b"\xff")
    )
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "bytes, allowed is a message of the service's proto" in await call.details()


async def test_a_method_that_does_not_exist_is_unimplemented(serve: Serve) -> None:
    channel: Any = await serve(ScriptedEngine())
    call = channel.unary_unary("/d2o_inference.v1.InferenceService/Guess")(b"")
    assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_calls_beyond_the_bound_are_pushed_back_while_probes_and_load_are_answered(serve: Serve) -> None:
    engine = ScriptedEngine((STARTED, 60.0))
    channel = await serve(engine, max_concurrent_rpcs=2)
    stub = InferenceServiceStub(channel)
    running = [stub.StreamGenerateText(STREAM) for _ in range(2)]
    for call in running:
        await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.GenerateText(UNARY)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(dict(refused.value.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
    assert len(engine.requests) == 2
    assert (await stub.GetLoad(pb.GetLoadRequest())).pages_total == 640
    health: Any = health_pb2_grpc.HealthStub(channel)
    await health.Check(health_pb2.HealthCheckRequest())
    for call in running:
        call.cancel()


async def test_calls_that_ended_make_room_again(serve: Serve) -> None:
    engine = ScriptedEngine((STARTED, 60.0))
    stub = InferenceServiceStub(await serve(engine, max_concurrent_rpcs=1))
    call = stub.StreamGenerateText(STREAM)
    await call.read()
    call.cancel()
    async with asyncio.timeout(2):
        while engine.ended < 1:
            await asyncio.sleep(0.002)
    engine.script = (STARTED, FINISHED)
    for _ in range(3):
        assert (await stub.GenerateText(UNARY)).started.generation_id == "gen-7"


class Punctual(ScriptedEngine):
    """Notices a deadline in the moment in which it passes, as the engine's own timer does."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        await asyncio.sleep(request.deadline - time.monotonic() if request.deadline else 0)
        raise DeadlineExceeded("the deadline passed while the request was queued")
        yield STARTED


async def test_a_deadline_that_engine_and_caller_notice_at_once_is_no_defect(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    stub = InferenceServiceStub(await serve(Punctual()))
    for _ in range(20):
        calls = [stub.StreamGenerateText(STREAM, timeout=0.02) for _ in range(20)]
        assert {await call.code() for call in calls} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    await asyncio.sleep(0.05)
    assert "ExecuteBatchError" not in caplog.text


async def test_an_expired_call_is_sent_no_status_which_would_fail_and_leak(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, access: pytest.LogCaptureFixture
) -> None:
    sent: list[grpc.StatusCode] = []

    class Watched:
        def __init__(self, context: Any) -> None:
            self._context = context

        def __getattr__(self, name: str) -> Any:
            return getattr(self._context, name)

        async def abort(self, code: grpc.StatusCode, *rest: Any) -> None:
            sent.append(code)
            await self._context.abort(code, *rest)

    run = CallInterceptor._run

    async def watched(self: CallInterceptor, record: Any, behaviour: Any, payload: bytes, context: Any) -> Any:
        proxy: Any = Watched(context)
        return await run(self, record, behaviour, payload, proxy)

    monkeypatch.setattr(CallInterceptor, "_run", watched)
    stub = InferenceServiceStub(await serve(Punctual()))
    calls = [stub.StreamGenerateText(STREAM, timeout=0.1) for _ in range(20)]
    assert {await call.code() for call in calls} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    lines = await access_lines(access, len(calls))
    assert {line["status"] for line in lines} == {"DEADLINE_EXCEEDED"}
    assert not sent
    # Without a deadline the same end is sent.
    assert await stub.StreamGenerateText(STREAM).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert sent == [grpc.StatusCode.DEADLINE_EXCEEDED]


async def test_a_refused_call_leaves_little_to_collect(serve: Serve) -> None:
    class Full(ScriptedEngine):
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
            raise Overloaded("the queue is full", 100, "queue")
            yield STARTED

    stub = InferenceServiceStub(await serve(Full()))
    for calls in (20, 200):
        gc.collect()
        gc.disable()
        before = len(gc.get_objects())
        for _ in range(calls):
            assert await stub.StreamGenerateText(STREAM).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        left = len(gc.get_objects()) - before
        gc.enable()
    # gRPC's own few; with tracebacks they were 70 a call.
    assert left < 10 * calls
