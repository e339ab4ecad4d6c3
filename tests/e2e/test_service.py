"""What the server says of itself: its model, its load, its health and its services."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from d2o_client import AsyncClient, HealthStatus, Policy
from tests.e2e.conftest import Launch
from tests.e2e.processes import TINY, ServerProcess


async def test_the_model_is_described(client: AsyncClient) -> None:
    info = await client.model_info()
    assert (info.model, info.dtype) == ("random:tiny-llama", "float32")
    assert (info.layers, info.compressible_layers, info.query_heads, info.kv_heads, info.head_dim) == (3, 3, 4, 2, 16)
    assert (info.vocabulary_size, info.max_model_len) == (512, 4096)
    assert (info.page_size, info.total_pages) == (32, 2000)
    # K and V in float32, and float32 score and bias and int32 position for every head's slot.
    assert info.page_bytes == 32 * 2 * (2 * 16 * 4 + 3 * 4)
    assert info.has_chat_template
    assert info.default_compression.policy is Policy.D2O
    assert info.default_max_new_tokens == 256


async def test_pages_are_reserved_while_a_request_runs(client: AsyncClient) -> None:
    async with client.stream("x" * 300, max_new_tokens=2000, ignore_end_of_text=True, compression="none") as stream:
        await anext(stream)
        load = await client.load()
        assert stream.started is not None
        assert load.pages_used + load.pages_reserved == stream.started.reserved_pages == 3 * -(-2300 // 32)
        assert load.pages_used >= 3 * -(-300 // 32)
        assert load.pages_free == load.pages_total - stream.started.reserved_pages
        assert (load.running, load.waiting, load.draining) == (1, 0, False)
        (worker,) = load.workers
        assert (worker.serving, worker.running, worker.pages_free) == (True, 1, load.pages_free)


async def test_health_is_serving_and_can_be_watched(client: AsyncClient, server: ServerProcess) -> None:
    assert await client.health() is HealthStatus.SERVING
    assert await client.health("d2o_inference.v1.InferenceService") is HealthStatus.SERVING
    async with grpc.aio.insecure_channel(server.target) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        async with asyncio.timeout(5):
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def test_tools_can_discover_the_services_where_they_may(launch_server: Launch) -> None:
    server = launch_server(*TINY, "--num-pages", "1000", "--reflection")
    async with grpc.aio.insecure_channel(server.target) as channel:
        plain: Any = channel  # the stub's annotations know the blocking channel only
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(plain)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = await stub.ServerReflectionInfo(iter([request])).read()
    services = {service.name for service in answer.list_services_response.service}
    assert services >= {"d2o_inference.v1.InferenceService", "grpc.health.v1.Health"}
