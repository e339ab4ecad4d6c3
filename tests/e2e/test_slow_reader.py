"""A caller that reads slowly costs nobody else anything."""

from __future__ import annotations

import asyncio
import time

import grpc
import psutil

from d2o_client import AsyncClient
from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.e2e.processes import ServerProcess

TOKENS = 800
MEBIBYTE = 2**20
# A caller with little room: what it does not read stays with the server after some hundred messages.
LITTLE_ROOM = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16 * 1024)]
# Log probabilities make every message some hundred bytes long.
REQUEST = pb.StreamGenerateTextRequest(
    prompt=pb.Prompt(text="y"),
    stopping=pb.StoppingParameters(max_new_tokens=TOKENS, ignore_end_of_text=True),
    logprobs=20,
)


async def seconds_of_another_stream(client: AsyncClient) -> float:
    began = time.perf_counter()
    await client.generate("x", max_new_tokens=100, ignore_end_of_text=True)
    return time.perf_counter() - began


async def test_a_slow_reader_slows_nobody_and_fills_no_memory(client: AsyncClient, server: ServerProcess) -> None:
    front = psutil.Process(server.process.pid)
    alone = await seconds_of_another_stream(client)
    before = front.memory_info().rss
    async with grpc.aio.insecure_channel(server.target, options=LITTLE_ROOM) as channel:
        slow = InferenceServiceStub(channel).StreamGenerateText(REQUEST)
        messages = [await slow.read(), await slow.read()]
        beside = await seconds_of_another_stream(client)
        # Two sequences share each step; what must not happen is that one waits for the other's reader.
        assert beside < 5 * alone + 1
        async with asyncio.timeout(60):
            while (await client.load()).running:
                await asyncio.sleep(1)
                messages.append(await slow.read())
        assert front.memory_info().rss - before < 64 * MEBIBYTE
        while (message := await slow.read()) is not grpc.aio.EOF:
            messages.append(message)
    sizes = [len(message.chunk.token_ids) for message in messages]
    assert sum(sizes) == TOKENS
    # What piled up while the reader slept came in one message.
    assert max(sizes) > 10
    assert messages[-1].WhichOneof("event") == "finished"
