"""Why the Service is headless: a balancer of layer 4 pins a channel to one server, all addresses let it take turns."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import cycle

import grpc
import pytest

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from d2o_server.rpc.server import RpcServer, RpcSettings
from tests.server.rpc.scripted_engine import ScriptedEngine

CALL = pb.GenerateTextRequest(prompt=pb.Prompt(text="hello"))
AGE = 0.3
ROUND_ROBIN = ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]}))


@asynccontextmanager
async def pods(**settings: float) -> AsyncIterator[tuple[list[ScriptedEngine], list[int]]]:
    """Two servers; gives what they run and their ports."""
    engines = [ScriptedEngine(), ScriptedEngine()]
    servers = [RpcServer(engine, RpcSettings(port=0, **settings)) for engine in engines]  # type: ignore[arg-type]
    yield engines, [await server.start() for server in servers]
    for server in servers:
        await server.stop(0)


@asynccontextmanager
async def layer_4(ports: list[int]) -> AsyncIterator[str]:
    """A balancer that gives each connection to the next server, as a Service with a cluster IP does, more or less."""
    turns, tasks = cycle(ports), set[asyncio.Task[None]]()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await asyncio.open_connection("127.0.0.1", next(turns))
        tasks.update({asyncio.create_task(copy(reader, upstream[1])), asyncio.create_task(copy(upstream[0], writer))})

    balancer = await asyncio.start_server(connect, "127.0.0.1", 0)
    yield f"127.0.0.1:{balancer.sockets[0].getsockname()[1]}"
    balancer.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def calls(target: str, options: list[tuple[str, str]], count: int = 20, pause: float = 0) -> None:
    """``count`` calls over one channel."""
    async with grpc.aio.insecure_channel(target, [*options, ("grpc.use_local_subchannel_pool", 1)]) as channel:
        for _ in range(count):
            await InferenceServiceStub(channel).GenerateText(CALL, wait_for_ready=True)
            await asyncio.sleep(pause)


@pytest.mark.parametrize("options", [[], [ROUND_ROBIN]])
async def test_a_balancer_of_layer_4_gives_all_calls_of_a_channel_to_one_server(
    options: list[tuple[str, str]],
) -> None:
    async with pods() as (engines, ports), layer_4(ports) as target:
        await calls(target, options)
    assert sorted(len(engine.requests) for engine in engines) == [0, 20]


async def test_a_channel_that_has_all_addresses_takes_turns() -> None:
    async with pods() as (engines, ports):
        target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
        async with grpc.aio.insecure_channel(target, [ROUND_ROBIN]) as channel:
            stub = InferenceServiceStub(channel)
            async with asyncio.timeout(10):
                # Turns are taken among the connections that stand.
                while not all(engine.requests for engine in engines):
                    await stub.GenerateText(CALL, wait_for_ready=True)
            before = [len(engine.requests) for engine in engines]
            for _ in range(20):
                await stub.GenerateText(CALL)
    after = [len(engine.requests) for engine in engines]
    assert [late - early for early, late in zip(before, after, strict=True)] == [10, 10]


async def test_an_age_moves_even_a_pinned_channel() -> None:
    async with pods(max_connection_age=AGE) as (engines, ports), layer_4(ports) as target:
        await calls(target, [], count=12, pause=AGE / 4)
    assert all(engine.requests for engine in engines)
