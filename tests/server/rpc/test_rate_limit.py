"""Calls a second and caller: the rate holds, waits are short, refusals are cheap and say when to come back."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import grpc
import pytest

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from d2o_server.errors import Overloaded
from d2o_server.rpc.rate_limit import RateLimit
from tests.server.rpc.conftest import Serve
from tests.server.rpc.scripted_engine import ScriptedEngine

CALLER = "ipv4:192.0.2.7"
UNARY = pb.GenerateTextRequest(prompt=pb.Prompt(text="hello"))


async def seconds_to_admit(limit: RateLimit, rate: int, caller: str = CALLER) -> float:
    began = time.monotonic()
    await limit.admit(caller, rate)
    return time.monotonic() - began


async def outcomes(limit: RateLimit, rate: int, calls: int) -> list[float | Overloaded]:
    """For each of as many calls at once: how long it waited, or how it was refused."""
    tries = (seconds_to_admit(limit, rate) for _ in range(calls))
    results = await asyncio.gather(*tries, return_exceptions=True)
    return [result for result in results if isinstance(result, (float, Overloaded))]


async def test_calls_within_the_rate_do_not_wait() -> None:
    limit = RateLimit()
    assert max([await seconds_to_admit(limit, 5) for _ in range(5)]) < 0.1


async def test_a_call_above_the_rate_is_refused_at_once() -> None:
    limit = RateLimit()
    began = time.monotonic()
    results = await outcomes(limit, 2, 3)
    assert [type(result) for result in results] == [float, float, Overloaded]
    with pytest.raises(Overloaded, match=r"^more than 2 generations a second from ipv4:192\.0\.2\.7; try") as refused:
        await limit.admit(CALLER, 2)
    assert time.monotonic() - began < 0.5
    assert 0 < refused.value.retry_after_ms <= 1002


async def test_who_comes_back_when_told_is_admitted() -> None:
    limit = RateLimit()
    await limit.admit(CALLER, 1)
    with pytest.raises(Overloaded) as refused:
        await limit.admit(CALLER, 1)
    await asyncio.sleep(refused.value.retry_after_ms / 1000)
    assert await seconds_to_admit(limit, 1) < 0.1


async def test_the_rate_holds_over_several_seconds() -> None:
    limit, admitted = RateLimit(), 0
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        admitted += [type(result) for result in await outcomes(limit, 5, 3)].count(float)
        await asyncio.sleep(0.02)
    assert 10 <= admitted <= 15


async def test_each_caller_has_a_rate_of_its_own_which_may_change() -> None:
    limit = RateLimit()
    for caller in ("key:a", "key:b", "certificate:a"):
        assert await seconds_to_admit(limit, 1, caller) < 0.1
    with pytest.raises(Overloaded):
        await limit.admit("key:a", 1)
    assert await seconds_to_admit(limit, 2, "key:a") < 0.1


async def test_no_rate_limits_nothing() -> None:
    assert len([wait for wait in await outcomes(RateLimit(), 0, 1000) if isinstance(wait, float)]) == 1000


async def test_a_flood_of_calls_does_not_busy_the_loop() -> None:
    flood = asyncio.ensure_future(outcomes(RateLimit(), 1, 4000))
    await asyncio.sleep(0.1)
    turns, began = 0, time.process_time()
    while not flood.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert time.process_time() - began < 0.5
    assert Counter(type(outcome) for outcome in await flood)[Overloaded] == 3999


async def test_a_refused_caller_reads_when_to_come_back(serve: Serve) -> None:
    engine = ScriptedEngine()
    stub = InferenceServiceStub(await serve(engine, rate_limit=1))
    calls = [stub.GenerateText(UNARY) for _ in range(3)]
    codes = Counter([await call.code() for call in calls])
    assert codes == {grpc.StatusCode.OK: 1, grpc.StatusCode.RESOURCE_EXHAUSTED: 2}
    assert len(engine.requests) == 1
    refused, _ = [call for call in calls if await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED]
    trailers = dict(await refused.trailing_metadata())
    assert 0 < int(trailers["grpc-retry-pushback-ms"]) <= 1002
    assert (await stub.GetLoad(pb.GetLoadRequest())).pages_total > 0


async def test_tokenizations_have_a_rate_beside_that_of_generations(serve: Serve) -> None:
    stub = InferenceServiceStub(await serve(ScriptedEngine(), rate_limit=1))
    await stub.GenerateText(UNARY)
    request = pb.TokenizeRequest(prompt=pb.Prompt(text="hello"))
    await stub.Tokenize(request)
    with pytest.raises(grpc.aio.AioRpcError, match="more than 1 tokenizations a second") as refused:
        await stub.Tokenize(request)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
