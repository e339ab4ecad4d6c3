"""A call that the server's loop takes late is served, however late; gRPC itself would cancel it after 30 s."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from d2o_server.rpc import server
from d2o_server.rpc.server import RpcServer, RpcSettings
from tests.server.rpc.scripted_engine import ScriptedEngine

LATE = 2.5


async def status_of_a_late_call() -> grpc.StatusCode:
    """How a call ends that came while the loop was busy for so long."""
    rpc = RpcServer(ScriptedEngine(), RpcSettings(port=0))
    target = f"127.0.0.1:{await rpc.start()}"
    # A client of threads, which go on while the loop stands still.
    with grpc.insecure_channel(target) as channel:
        await asyncio.to_thread(grpc.channel_ready_future(channel).result, 5)
        stub = InferenceServiceStub(channel)
        # The server asks for one call ahead: the others wait.
        calls = [stub.GetModelInfo.future(pb.GetModelInfoRequest()) for _ in range(4)]
        time.sleep(LATE)  # noqa: ASYNC251 - that is what a busy loop does
        codes: list[grpc.StatusCode] = [await asyncio.to_thread(call.code) for call in calls]
    await rpc.stop(0)
    return codes[-1]


async def test_it_is_served() -> None:
    assert await status_of_a_late_call() is grpc.StatusCode.OK


async def test_it_would_be_cancelled_where_it_had_waited_for_longer_than_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that the option is known to be the one that counts."""
    monkeypatch.setattr(server, "_SECONDS_UNTIL_TAKEN", 1)
    assert await status_of_a_late_call() is grpc.StatusCode.CANCELLED
