"""The server around the service: port, health, reflection, limits, TLS and a stop that lets streams finish."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from d2o_server.errors import SettingsError, StartupError
from d2o_server.rpc.server import RpcServer, RpcSettings
from d2o_server.telemetry.calls import CallObserver
from tests.server.rpc.conftest import Serve
from tests.server.rpc.scripted_engine import CHUNKS, FINISHED, STARTED, ScriptedEngine

STREAM = pb.StreamGenerateTextRequest(prompt=pb.Prompt(text="hello"))
SERVICE = "d2o_inference.v1.InferenceService"


class Ended(CallObserver):
    """Method, status and rejection of the calls that ended."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str | None]] = []

    def call_ended(self, method: str, status: str, rejection: str | None) -> None:
        self.calls.append((method, status, rejection))


async def reflected(channel: Any, **request: Any) -> Any:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    return await stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**request)])).read()


async def test_reflection_describes_the_service_to_tools(serve: Serve) -> None:
    channel = await serve(ScriptedEngine(), reflection=True)
    listed = (await reflected(channel, list_services="")).list_services_response
    assert {service.name for service in listed.service} >= {SERVICE, "grpc.health.v1.Health"}
    described = await reflected(channel, file_containing_symbol=SERVICE)
    files = [FileDescriptorProto.FromString(raw) for raw in described.file_descriptor_response.file_descriptor_proto]
    methods = {method.name for file in files for service in file.service for method in service.method}
    assert methods >= {"GenerateText", "StreamGenerateText", "Tokenize", "GetModelInfo", "GetLoad"}


async def test_there_is_no_reflection_unless_it_is_asked_for(serve: Serve) -> None:
    channel: Any = await serve(ScriptedEngine())
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    # Without a request: one that is still being sent when the refusal comes ends INTERNAL in the client.
    assert await stub.ServerReflectionInfo().code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_message_above_the_limit_is_refused_before_it_is_read(serve: Serve) -> None:
    engine = ScriptedEngine()
    stub = InferenceServiceStub(await serve(engine, max_message_bytes=4096))
    await stub.GenerateText(pb.GenerateTextRequest(prompt=pb.Prompt(text="x" * 4000)))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.GenerateText(pb.GenerateTextRequest(prompt=pb.Prompt(text="x" * 5000)))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(engine.requests) == 1


async def test_what_is_sent_by_mistake_is_read_and_refused_by_its_field(serve: Serve) -> None:
    stub = InferenceServiceStub(await serve(ScriptedEngine()))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(tokens=pb.TokenIds(ids=[1] * 8_000_000))))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details() == "prompt.tokens.ids: got 8000000 ids, allowed is at most 2048"


async def test_a_port_in_use_is_named(serve: Serve) -> None:
    first = RpcServer(ScriptedEngine(), RpcSettings(port=0))
    port = await first.start()
    second = RpcServer(ScriptedEngine(), RpcSettings(port=port))
    with pytest.raises(StartupError, match=rf"^host, port: got 127\.0\.0\.1:{port}, .* free port$"):
        await second.start()
    await second.stop(0)
    await first.stop(0)


async def test_streams_that_run_at_a_stop_finish_within_the_grace() -> None:
    engine = ScriptedEngine((STARTED, CHUNKS[0], 0.2, FINISHED))
    server = RpcServer(engine, RpcSettings(port=0))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel:
        await server.set_serving(True)
        call = InferenceServiceStub(channel).StreamGenerateText(STREAM)
        await call.read()
        await server.set_serving(False)
        late = InferenceServiceStub(channel).StreamGenerateText(STREAM)
        assert (await late.read()).WhichOneof("event") == "started"
        stopping = asyncio.create_task(server.stop(grace=5))
        for stream in (call, late):
            while (message := await stream.read()) is not grpc.aio.EOF:
                last = message.WhichOneof("event")
            assert last == "finished"
            assert await stream.code() is grpc.StatusCode.OK
        async with asyncio.timeout(2):
            await stopping


async def test_streams_that_outlast_the_grace_are_ended_and_their_generations_closed() -> None:
    engine = ScriptedEngine((STARTED, 60.0))
    server = RpcServer(engine, RpcSettings(port=0))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel:
        call = InferenceServiceStub(channel).StreamGenerateText(STREAM)
        await call.read()
        async with asyncio.timeout(2):
            await server.stop(grace=0.05)
            while engine.ended == 0:
                await asyncio.sleep(0.002)
        assert await call.code() is not grpc.StatusCode.OK


@pytest.mark.parametrize("grace", [0, 0.5])
async def test_a_stop_records_what_it_cuts_as_its_callers_see_it(grace: float) -> None:
    ended = Ended()
    server = RpcServer(ScriptedEngine((STARTED, 60.0)), RpcSettings(port=0), ended)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel:
        stub = InferenceServiceStub(channel)
        cut, left = stub.StreamGenerateText(STREAM), stub.StreamGenerateText(STREAM)
        for call in (cut, left):
            await call.read()
        stopping = asyncio.create_task(server.stop(grace))
        if grace:
            left.cancel()
        async with asyncio.timeout(5):
            while len(ended.calls) < 2:
                await asyncio.sleep(0.002)
            await stopping
        assert await cut.code() is grpc.StatusCode.UNAVAILABLE
    # Who leaves within the grace has left of its own accord.
    first = "CANCELLED" if grace else "UNAVAILABLE"
    assert ended.calls == [("StreamGenerateText", first, None), ("StreamGenerateText", "UNAVAILABLE", None)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": ""}, "host: got an empty string"),
        ({"port": 65536}, "port: got 65536, allowed is [0, 65535]"),
        ({"max_message_bytes": 1}, "max_message_bytes: got 1, allowed is [1024, 2147483647]"),
        ({"max_concurrent_rpcs": 0}, "max_concurrent_rpcs: got 0, allowed is [1, 2147483647]"),
        ({"tls_key": Path("key.pem")}, "tls_certificate: got nothing"),
        ({"tls_certificate": Path("certificate.pem")}, "tls_key: got nothing"),
        ({"tls_client_ca": Path("ca.pem")}, "tls_client_ca: got a file, allowed is none without tls_certificate"),
        ({"max_client_streams": 9}, "max_client_streams: got 9, allowed is 0 without api_keys or tls_client_ca: it"),
        ({"max_client_pages": 500}, "max_client_pages: got 500, allowed is 0 without api_keys or tls_client_ca: it"),
        (
            {"max_connection_age_grace": 0.0},
            "max_connection_age_grace: got 0.0, allowed is none without max_connection_age",
        ),
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        RpcSettings(**settings)
    assert str(refused.value).startswith(message)


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


@pytest.fixture
def tls(authority: trustme.CA, tmp_path: Path) -> dict[str, Path]:
    """TLS settings of a server whose certificate is for the loopback address."""
    files = {"tls_certificate": tmp_path / "certificate.pem", "tls_key": tmp_path / "key.pem"}
    issued = authority.issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA)
    files["tls_key"].write_bytes(issued.private_key_pem.bytes())
    files["tls_certificate"].write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    return files


async def model_over_tls(settings: dict[str, Path], credentials: grpc.ChannelCredentials) -> str:
    server = RpcServer(ScriptedEngine(), RpcSettings(port=0, **settings))  # type: ignore[arg-type]
    port = await server.start()
    try:
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
            info = await InferenceServiceStub(channel).GetModelInfo(pb.GetModelInfoRequest(), timeout=10)
            return str(info.model)
    finally:
        await server.stop(0)


async def test_tls_serves_callers_that_trust_its_authority(authority: trustme.CA, tls: dict[str, Path]) -> None:
    roots = authority.cert_pem.bytes()
    assert await model_over_tls(tls, grpc.ssl_channel_credentials(roots)) == "scripted"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await model_over_tls(tls, grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes()))
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_mutual_tls_serves_only_callers_with_a_certificate_of_its_authority(
    authority: trustme.CA, tls: dict[str, Path], tmp_path: Path
) -> None:
    roots = authority.cert_pem.bytes()
    tls["tls_client_ca"] = tmp_path / "authority.pem"
    tls["tls_client_ca"].write_bytes(roots)
    own = authority.issue_cert("caller@example.org", key_type=trustme.KeyType.ECDSA)
    key, chain = own.private_key_pem.bytes(), b"".join(blob.bytes() for blob in own.cert_chain_pems)
    assert await model_over_tls(tls, grpc.ssl_channel_credentials(roots, key, chain)) == "scripted"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await model_over_tls(tls, grpc.ssl_channel_credentials(roots))
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tls_key", None, r"^tls_key: got .*, allowed is a readable PEM file \(No such file or directory\)$"),
        ("tls_certificate", b"not PEM", r"^tls_certificate, tls_key: got .*, allowed is a PEM certificate and "),
        ("tls_key", b"not PEM", r"^tls_certificate, tls_key: got .*, allowed is a PEM certificate and "),
        ("tls_client_ca", b"not PEM", r"^tls_client_ca: got .*, allowed is PEM certificates$"),
    ],
)
async def test_a_tls_file_that_cannot_be_used_is_named(
    tls: dict[str, Path], tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    tls[name] = tmp_path / "unusable.pem"
    if content is not None:
        tls[name].write_bytes(content)
    server = RpcServer(ScriptedEngine(), RpcSettings(port=0, **tls))  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=message):
        await server.start()
    await server.stop(0)


async def test_a_key_of_another_certificate_is_refused_at_the_start(tls: dict[str, Path]) -> None:
    stranger = trustme.CA(key_type=trustme.KeyType.ECDSA).issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA)
    tls["tls_key"].write_bytes(stranger.private_key_pem.bytes())
    server = RpcServer(ScriptedEngine(), RpcSettings(port=0, **tls))  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"^tls_certificate, tls_key: .*unencrypted key"):
        await server.start()
    await server.stop(0)
