"""Connections grow old, a tenth apart; the streams on them do not notice, unless a grace says so."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from d2o_server.errors import SettingsError
from d2o_server.rpc.server import RpcServer, RpcSettings
from tests.server.rpc.scripted_engine import CHUNKS, FINISHED, STARTED, ScriptedEngine

STREAM = pb.StreamGenerateTextRequest(prompt=pb.Prompt(text="hello"))
AGE = 1.0
# How late a busy machine may be.
LATE = 0.6


@asynccontextmanager
async def served(engine: ScriptedEngine, **settings: float) -> AsyncIterator[str]:
    server = RpcServer(engine, RpcSettings(port=0, **settings))  # type: ignore[arg-type]
    yield f"127.0.0.1:{await server.start()}"
    await server.stop(0)


async def seconds_until_asked_to_go(target: str, options: Any = ()) -> float:
    """How long a new connection of its own lasts."""
    async with grpc.aio.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1), *options]) as channel:
        await channel.channel_ready()
        began = time.monotonic()
        async with asyncio.timeout(3 * AGE):
            await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        return time.monotonic() - began


async def test_connections_are_asked_to_go_at_their_age_and_not_all_at_once() -> None:
    async with served(ScriptedEngine(), max_connection_age=AGE) as target:
        ages = await asyncio.gather(*(seconds_until_asked_to_go(target) for _ in range(12)))
    assert min(ages) > 0.7 * AGE
    assert max(ages) < 1.1 * AGE + LATE
    assert max(ages) - min(ages) > 0.02 * AGE


async def test_a_stream_outlives_its_connection_s_age_and_the_next_call_finds_the_server() -> None:
    engine = ScriptedEngine((STARTED, *(CHUNKS[0], 0.1) * 8, FINISHED))
    async with served(engine, max_connection_age=0.2) as target, grpc.aio.insecure_channel(target) as channel:
        stub = InferenceServiceStub(channel)
        call = stub.StreamGenerateText(STREAM)
        messages = [message async for message in call]
        assert len(messages) == 10
        assert await call.code() is grpc.StatusCode.OK
        assert (await stub.GetModelInfo(pb.GetModelInfoRequest())).model == "scripted"


async def test_a_stream_that_outlasts_the_grace_is_cut_and_its_generation_closed() -> None:
    engine = ScriptedEngine((STARTED, 60.0))
    age = {"max_connection_age": 0.2, "max_connection_age_grace": 0.1}
    async with served(engine, **age) as target, grpc.aio.insecure_channel(target) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            async with asyncio.timeout(5):
                _ = [message async for message in InferenceServiceStub(channel).StreamGenerateText(STREAM)]
        assert cut.value.code() is grpc.StatusCode.UNAVAILABLE
        async with asyncio.timeout(2):
            while engine.ended == 0:
                await asyncio.sleep(0.002)


async def test_without_an_age_a_connection_stays() -> None:
    async with served(ScriptedEngine()) as target:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(seconds_until_asked_to_go(target), 0.5)


@pytest.mark.parametrize("name", ["max_connection_age", "max_connection_age_grace"])
@pytest.mark.parametrize("given", [-1.0, math.nan, 3e6])
def test_an_age_out_of_bounds_is_named(name: str, given: float) -> None:
    with pytest.raises(SettingsError, match=rf"^{name}: got {given}, allowed is \[0, 2000000\] seconds$"):
        RpcSettings(**{name: given})  # type: ignore[arg-type]
