"""What a traced call leaves behind; which spans it makes is asked of a whole server in tests/e2e/test_telemetry.py."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from d2o_server.engine.observer import Timeline
from d2o_server.engine.types import CacheFacts
from d2o_server.rpc.server import RpcServer, RpcSettings
from d2o_server.telemetry import tracing
from tests.server.rpc.scripted_engine import STARTED, ScriptedEngine

CALLS = 100
REQUEST = pb.StreamGenerateTextRequest(prompt=pb.Prompt(text="x"))


class Counting(SpanExporter):
    """Counts spans and keeps none."""

    def __init__(self) -> None:
        self.spans = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans += len(spans)
        return SpanExportResult.SUCCESS


@pytest.mark.parametrize(
    ("ended", "stages"),
    [
        (3.0, [("queue", 1.0, 1.5), ("prefill", 1.5, 2.0), ("compress", 2.0, 2.25), ("decode", 2.25, 3.0)]),
        # The only token comes with the end, which waits for compression.
        (2.0, [("queue", 1.0, 1.5), ("prefill", 1.5, 1.75), ("compress", 1.75, 2.0), ("decode", 2.0, 2.0)]),
    ],
)
def test_compression_is_a_stage_after_the_first_token(ended: float, stages: list[tuple[str, float, float]]) -> None:
    cache = CacheFacts(
        layers=(), ratio_reached=0.5, peak_pages=1, compression_seconds=0.5, prompt_compression_seconds=0.25
    )
    timeline = Timeline(
        generation_id="g",
        arrived=1.0,
        admitted=1.5,
        first_token=2.0,
        ended=ended,
        prompt_tokens=4,
        completion_tokens=5,
        reason="length",
        cache=cache,
    )
    found = tracing._stages(timeline)
    assert [stage[:3] for stage in found] == stages
    assert found[-1][3]["d2o.eviction_seconds"] == 0.25


async def test_a_traced_call_that_is_cancelled_leaves_little_to_collect(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting()
    monkeypatch.setattr(tracing, "_exporter", lambda _: counting)
    traces = tracing.Tracing("console", "0")
    server = RpcServer(ScriptedEngine((STARTED, 60.0)), RpcSettings(port=0), None, (traces.interceptor(),))

    async def cancelled(stub: InferenceServiceStub) -> None:
        call = stub.StreamGenerateText(REQUEST)
        await call.read()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.read()

    async with grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel:
        stub = InferenceServiceStub(channel)
        await cancelled(stub)
        gc.collect()
        gc.disable()
        try:
            before = len(gc.get_objects())
            for _ in range(CALLS):
                await cancelled(stub)
            await asyncio.sleep(0.2)
            left = len(gc.get_objects()) - before
        finally:
            gc.enable()
    await server.stop(0)
    await traces.close()
    assert counting.spans == CALLS + 1
    # Some 30, most of them of the client, which is in this process; more than 100 with the span's own frames.
    assert left < 60 * CALLS
