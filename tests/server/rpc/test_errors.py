"""One row for each error: what a caller sees of it, over a real channel."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from d2o_server import errors
from d2o_server.rpc.errors import STATUS_CODES, status_of
from tests.server.rpc.conftest import Serve
from tests.server.rpc.scripted_engine import CHUNKS, STARTED, ScriptedEngine

STREAM = pb.StreamGenerateTextRequest(prompt=pb.Prompt(text="hello"))
UNARY = pb.GenerateTextRequest(prompt=pb.Prompt(text="hello"))


def every_class(base: type[errors.ServerError] = errors.ServerError) -> set[type[errors.ServerError]]:
    return {base}.union(*(every_class(child) for child in base.__subclasses__()))


def an_example(kind: type[errors.ServerError]) -> errors.ServerError:
    if kind is errors.InvalidRequest:
        return errors.InvalidRequest("prompt", "9000 tokens", "at most 2048")
    if kind is errors.Overloaded:
        return errors.Overloaded("128 requests are waiting", 750)
    return kind(f"an example of {kind.__name__}")


def test_every_error_class_has_exactly_one_row() -> None:
    ours = {kind for kind in every_class() if kind.__module__ == errors.__name__}
    assert set(STATUS_CODES) == ours


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
        (errors.Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
        (errors.WorkerDied, grpc.StatusCode.UNAVAILABLE),
        (errors.OutOfDeviceMemory, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.Draining, grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_the_failures_that_the_design_names_have_its_codes(
    kind: type[errors.ServerError], code: grpc.StatusCode
) -> None:
    assert STATUS_CODES[kind] is code


def test_an_error_derived_elsewhere_takes_the_row_of_its_base() -> None:
    class WorkerLost(errors.WorkerDied):
        pass

    assert status_of(WorkerLost("gone"), "gen-1").code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("before", [(), (STARTED, CHUNKS[0])], ids=["first", "midway"])
@pytest.mark.parametrize("kind", list(STATUS_CODES))
async def test_a_caller_sees_the_status_and_message_of_its_error(
    serve: Serve, kind: type[errors.ServerError], before: tuple[object, ...]
) -> None:
    error = an_example(kind)
    stub = InferenceServiceStub(await serve(ScriptedEngine((*before, error))))  # type: ignore[arg-type]
    stream = stub.StreamGenerateText(STREAM)
    received = []
    with pytest.raises(grpc.aio.AioRpcError) as streamed:
        received.extend([message async for message in stream])
    with pytest.raises(grpc.aio.AioRpcError) as collected:
        await stub.GenerateText(UNARY)
    for ended in (streamed.value, collected.value):
        assert ended.code() is STATUS_CODES[kind]
        if STATUS_CODES[kind] is grpc.StatusCode.INTERNAL:
            assert "an example" not in (ended.details() or "")
        else:
            assert ended.details() == str(error)


async def test_an_overloaded_server_says_when_to_come_back(serve: Serve) -> None:
    stub = InferenceServiceStub(await serve(ScriptedEngine((an_example(errors.Overloaded),))))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.GenerateText(UNARY)
    assert dict(refused.value.trailing_metadata())["grpc-retry-pushback-ms"] == "750"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("secret path"), errors.EngineFailure("secret path"), asyncio.CancelledError("secret path")],
)
async def test_a_defect_of_ours_shows_the_generation_and_hides_the_rest(
    serve: Serve, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    stub = InferenceServiceStub(await serve(ScriptedEngine((STARTED, error))))
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await stub.GenerateText(UNARY)
    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert failed.value.details() == "internal error; the server's log has it under generation gen-7"
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logged) == 1
    assert "gen-7" in logged[0].getMessage()
    assert logged[0].exc_info is not None
    assert "secret path" in str(logged[0].exc_info[1])


async def test_a_defect_before_a_generation_has_an_id_is_found_in_the_log_all_the_same(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    stub = InferenceServiceStub(await serve(ScriptedEngine((RuntimeError("early"),))))
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await stub.GenerateText(UNARY)
    reference = (failed.value.details() or "").rpartition(" ")[2]
    assert reference
    assert any(reference in record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)


async def test_a_message_too_long_for_a_header_is_cut(serve: Serve) -> None:
    error = errors.Unavailable("x" * 100_000)
    stub = InferenceServiceStub(await serve(ScriptedEngine((error,))))
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await stub.GenerateText(UNARY)
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    assert failed.value.details() == "x" * 1024
