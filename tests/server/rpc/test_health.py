"""grpc.health.v1: what probes and watching callers are told, from the start to the end of a server's life."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from d2o_server.rpc.server import RpcServer, RpcSettings
from tests.server.rpc.scripted_engine import ScriptedEngine

SERVICE = "d2o_inference.v1.InferenceService"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def server() -> AsyncIterator[RpcServer]:
    server = RpcServer(ScriptedEngine(), RpcSettings(port=0))
    yield server
    await server.stop(0)


@pytest.fixture
async def health(server: RpcServer) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel:
        yield health_pb2_grpc.HealthStub(channel)


def asking(service: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_nothing_serves_until_told_and_no_longer_than_told(server: RpcServer, health: Any, service: str) -> None:
    for serving in (None, True, False, True):
        if serving is not None:
            await server.set_serving(serving)
        assert (await health.Check(asking(service))).status == (SERVING if serving else NOT_SERVING)


async def test_a_service_that_is_not_here_is_not_found(health: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await health.Check(asking("other.Service"))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    watched = await health.Watch(asking("other.Service")).read()
    assert watched.status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_a_watcher_hears_every_change_after_another_watcher_left(server: RpcServer, health: Any) -> None:
    leaving, staying = health.Watch(asking(SERVICE)), health.Watch(asking(SERVICE))
    assert [(await watch.read()).status for watch in (leaving, staying)] == [NOT_SERVING] * 2
    leaving.cancel()
    await health.Check(asking(""))
    async with asyncio.timeout(2):
        for serving in (True, False):
            await server.set_serving(serving)
            assert (await staying.read()).status == (SERVING if serving else NOT_SERVING)


async def test_watchers_hear_the_end_and_do_not_delay_it(server: RpcServer, health: Any) -> None:
    await server.set_serving(True)
    watch = health.Watch(asking(""))
    assert (await watch.read()).status == SERVING
    began = time.perf_counter()
    await server.stop(grace=30)
    assert time.perf_counter() - began < 2
    assert (await watch.read()).status == NOT_SERVING
    assert await watch.read() is grpc.aio.EOF
    assert await watch.code() is grpc.StatusCode.OK
