"""What a balancer relies on, from a server as it is started: connections that grow old, and its load in trailers."""

from __future__ import annotations

import asyncio

import grpc

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.e2e.conftest import Launch
from tests.e2e.processes import TINY


async def test_streams_outlive_their_connection_and_tell_the_load(launch_server: Launch) -> None:
    server = launch_server(*TINY, "--num-pages", "1000", "--max-connection-age", "0.3")
    request = pb.StreamGenerateTextRequest(
        prompt=pb.Prompt(text="x"), stopping=pb.StoppingParameters(max_new_tokens=800, ignore_end_of_text=True)
    )
    async with grpc.aio.insecure_channel(server.target) as channel:
        call = InferenceServiceStub(channel).StreamGenerateText(request)
        messages = aiter(call)
        assert (await anext(messages)).WhichOneof("event") == "started"
        async with asyncio.timeout(5):
            await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        assert not call.done()
        *_, last = [message async for message in messages]
        assert last.finished.usage.completion_tokens == 800
        trailers = dict(await call.trailing_metadata())
        assert trailers["d2o-pages-total"] == "1000"
        assert 0 < int(trailers["d2o-pages-free"]) <= 1000
        assert int(trailers["d2o-requests-waiting"]) == 0
