"""Generations a second and peer: the rate holds, waits are short, refusals are cheap and say when to come back."""

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

PEER = "ipv4:192.0.2.7:40000"
UNARY = pb.GenerateTextRequest(prompt=pb.Prompt(text="hello"))


async def seconds_to_admit(limit: RateLimit, peer: str = PEER) -> float:
    began = time.monotonic()
    await limit.admit(peer)
    return time.monotonic() - began


async def outcomes(limit: RateLimit, calls: int, peer: str = PEER) -> list[float | Overloaded]:
    """For each of as many calls at once: how long it waited, or how it was refused."""
    tries = (seconds_to_admit(limit, peer) for _ in range(calls))
    results = await asyncio.gather(*tries, return_exceptions=True)
    return [result for result in results if isinstance(result, (float, Overloaded))]


async def test_calls_within_the_rate_do_not_wait() -> None:
    waits = [await seconds_to_admit(RateLimit(5)) for _ in range(5)]
    assert max(waits) < 0.1


async def test_a_call_above_the_rate_is_refused_at_once() -> None:
    limit = RateLimit(2)
    began = time.monotonic()
    results = await outcomes(limit, 3)
    assert [type(result) for result in results] == [float, float, Overloaded]
    with pytest.raises(Overloaded, match=r"^more than 2 generations a second from ipv4:192\.0\.2\.7; try") as refused:
        await limit.admit(PEER)
    assert time.monotonic() - began < 0.5
    assert 0 < refused.value.retry_after_ms <= 1002


async def test_who_comes_back_when_told_is_admitted() -> None:
    limit = RateLimit(1)
    await limit.admit(PEER)
    with pytest.raises(Overloaded) as refused:
        await limit.admit(PEER)
    await asyncio.sleep(refused.value.retry_after_ms / 1000)
    assert await seconds_to_admit(limit) < 0.1


async def test_the_rate_holds_over_several_seconds() -> None:
    limit, admitted = RateLimit(5), 0
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        admitted += [type(result) for result in await outcomes(limit, 3)].count(float)
        await asyncio.sleep(0.02)
    assert 10 <= admitted <= 15


async def test_connections_of_one_address_share_its_rate_and_others_have_their_own() -> None:
    limit = RateLimit(1)
    assert await seconds_to_admit(limit, "ipv4:192.0.2.7:1") < 0.1
    assert await seconds_to_admit(limit, "ipv4:192.0.2.8:1") < 0.1
    assert await seconds_to_admit(limit, "ipv6:%5B2001:db8::1%5D:1") < 0.1
    with pytest.raises(Overloaded):
        await limit.admit("ipv4:192.0.2.7:2")


async def test_no_rate_limits_nothing() -> None:
    assert len([wait for wait in await outcomes(RateLimit(0), 1000) if isinstance(wait, float)]) == 1000


async def test_a_flood_of_calls_does_not_busy_the_loop() -> None:
    flood = asyncio.ensure_future(outcomes(RateLimit(1), 4000))
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
