from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest

from d2o_server.rpc.server import RpcServer, RpcSettings
from tests.server.rpc.scripted_engine import ScriptedEngine

Serve = Callable[..., Awaitable[grpc.aio.Channel]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serves an engine on a free loopback port and gives a channel to it; both are closed at the end of the test."""
    servers: list[RpcServer] = []
    channels: list[grpc.aio.Channel] = []

    async def start(engine: ScriptedEngine, **settings: object) -> grpc.aio.Channel:
        server = RpcServer(engine, RpcSettings(port=0, **settings))  # type: ignore[arg-type]
        port = await server.start()
        servers.append(server)
        channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        return channels[-1]

    yield start
    for channel in channels:
        await channel.close()
    for server in servers:
        await server.stop(grace=0)
