"""Every answer, and every error, says how full its server is."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from d2o_server.errors import Overloaded
from tests.server.rpc.conftest import Serve
from tests.server.rpc.scripted_engine import LOAD, STARTED, ScriptedEngine

PROMPT = pb.Prompt(text="hello")
EXPECTED = {
    "d2o-pages-total": str(LOAD.pages_total),
    "d2o-pages-free": str(LOAD.pages_free),
    "d2o-requests-running": str(LOAD.running),
    "d2o-requests-waiting": str(LOAD.waiting),
}


def load_in(trailers: Any) -> dict[str, str]:
    return {key: value for key, value in trailers if key.startswith("d2o-")}


async def test_a_whole_answer_ends_with_the_load(serve: Serve) -> None:
    call = InferenceServiceStub(await serve(ScriptedEngine())).GenerateText(pb.GenerateTextRequest(prompt=PROMPT))
    await call
    assert load_in(await call.trailing_metadata()) == EXPECTED


async def test_a_stream_ends_with_the_load(serve: Serve) -> None:
    stub = InferenceServiceStub(await serve(ScriptedEngine()))
    call = stub.StreamGenerateText(pb.StreamGenerateTextRequest(prompt=PROMPT))
    assert [message async for message in call]
    assert load_in(await call.trailing_metadata()) == EXPECTED


@pytest.mark.parametrize("error", [Overloaded("the queue is full", 300), RuntimeError("defect")])
async def test_an_error_brings_the_load_beside_its_own_trailers(serve: Serve, error: Exception) -> None:
    stub = InferenceServiceStub(await serve(ScriptedEngine((STARTED, error))))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.GenerateText(pb.GenerateTextRequest(prompt=PROMPT))
    trailers = refused.value.trailing_metadata()
    assert load_in(trailers) == EXPECTED
    assert (("grpc-retry-pushback-ms", "300") in tuple(trailers)) == isinstance(error, Overloaded)
