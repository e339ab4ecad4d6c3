"""Who is let in, whom a call is counted for, and what one caller may run: over real connections."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from d2o_server.errors import SettingsError
from d2o_server.rpc.api_keys import new_key
from d2o_server.rpc.auth import Authenticator, Caller, CallerLimits, address_of
from d2o_server.rpc.server import RpcServer, RpcSettings
from tests.server.rpc.conftest import Serve
from tests.server.rpc.scripted_engine import CHUNKS, FINISHED, STARTED, ScriptedEngine
from tests.server.rpc.test_api_keys import write

UNARY = pb.GenerateTextRequest(prompt=pb.Prompt(text="hello"))
STREAM = pb.StreamGenerateTextRequest(prompt=pb.Prompt(text="hello"))
REFUSAL = "a valid API key is required: metadata authorization with Bearer and the key"
ENDLESS = (STARTED, CHUNKS[0], 60.0, FINISHED)


class Keys:
    """A file of keys; ``bearer`` is the metadata of a name's key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._keys: dict[str, str] = {}
        self.lines: list[str] = []

    def add(self, name: str, **limits: int) -> tuple[tuple[str, str]]:
        self._keys[name], stored = new_key(name, **limits)
        self.lines.append(stored.line())
        write(self.path, *self.lines)
        return self.bearer(name)

    def bearer(self, name: str) -> tuple[tuple[str, str]]:
        return (("authorization", f"Bearer {self._keys[name]}"),)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys")


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), error.value.details() or ""


async def test_a_right_key_is_let_in_and_logged_by_name(
    serve: Serve, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="d2o_server.access")
    mine = keys.add("team-a")
    engine = ScriptedEngine()
    stub = InferenceServiceStub(await serve(engine, api_keys=keys.path))
    await stub.GenerateText(UNARY, metadata=mine)
    await stub.GenerateText(UNARY, metadata=(("authorization", mine[0][1].replace("Bearer", "bearer")),))
    assert [request.owner for request in engine.requests] == ["key:team-a"] * 2
    assert 'caller="key:team-a"' in caplog.text
    assert mine[0][1].removeprefix("Bearer ") not in caplog.text


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer "),),
        (("authorization", "Bearer team-a.wrong"),),
        (("authorization", "Bearer nobody.wrong"),),
        (("authorization", "Basic dGVhbS1hOng="),),
        (("authorization", "Bearer " + "x" * 5000),),
        (("authorization-bin", b"\xff\x00"),),
    ],
)
async def test_every_other_call_is_refused_in_the_same_words(
    serve: Serve, keys: Keys, metadata: tuple[tuple[str, Any], ...]
) -> None:
    keys.add("team-a")
    engine = ScriptedEngine()
    stub = InferenceServiceStub(await serve(engine, api_keys=keys.path))
    empty = (pb.TokenizeRequest(), pb.GetModelInfoRequest(), pb.GetLoadRequest())
    calls = [stub.GenerateText(UNARY, metadata=metadata), stub.StreamGenerateText(STREAM, metadata=metadata).read()]
    calls += [
        method(request, metadata=metadata)
        for method, request in zip((stub.Tokenize, stub.GetModelInfo, stub.GetLoad), empty, strict=True)
    ]
    for call in calls:
        assert await refused(call) == (grpc.StatusCode.UNAUTHENTICATED, REFUSAL)
    assert engine.requests == []


async def test_a_key_beside_another_is_refused(serve: Serve, keys: Keys) -> None:
    mine = keys.add("team-a")
    stub = InferenceServiceStub(await serve(ScriptedEngine(), api_keys=keys.path))
    twice = (*mine, ("authorization", "Bearer team-a.wrong"))
    assert await refused(stub.GenerateText(UNARY, metadata=twice)) == (grpc.StatusCode.UNAUTHENTICATED, REFUSAL)


async def test_no_message_is_received_of_a_caller_who_is_not_let_in(serve: Serve, keys: Keys) -> None:
    keys.add("team-a")
    channel = await serve(ScriptedEngine(), api_keys=keys.path)
    # It never sends its message, and is told all the same.
    call: Any = channel.stream_stream("/d2o_inference.v1.InferenceService/GenerateText")()
    async with asyncio.timeout(5):
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_health_is_open_and_reflection_is_not(serve: Serve, keys: Keys) -> None:
    mine = keys.add("team-a")
    channel: Any = await serve(ScriptedEngine(), api_keys=keys.path, reflection=True)
    health: Any = health_pb2_grpc.HealthStub(channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    assert await refused(reflection.ServerReflectionInfo(iter([question])).read()) == (
        grpc.StatusCode.UNAUTHENTICATED,
        REFUSAL,
    )
    listed = await reflection.ServerReflectionInfo(iter([question]), metadata=mine).read()
    assert listed.list_services_response.service


async def test_a_change_of_the_keys_drops_no_stream(serve: Serve, keys: Keys) -> None:
    mine = keys.add("team-a")
    stub = InferenceServiceStub(await serve(ScriptedEngine((STARTED, 2.5, FINISHED)), api_keys=keys.path))
    stream = stub.StreamGenerateText(STREAM, metadata=mine)
    messages = aiter(stream)
    await anext(messages)
    keys.lines.clear()
    theirs = keys.add("team-b")
    async with asyncio.timeout(5):
        while True:
            late = stub.GetLoad(pb.GetLoadRequest(), metadata=mine)
            if await late.code() is grpc.StatusCode.UNAUTHENTICATED:
                break
            await asyncio.sleep(0.05)
    await stub.GetLoad(pb.GetLoadRequest(), metadata=theirs)
    *_, last = [message async for message in messages]
    assert last.WhichOneof("event") == "finished"
    assert await stream.code() is grpc.StatusCode.OK


def test_a_file_of_keys_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^api_keys: got "):
        RpcServer(ScriptedEngine(), RpcSettings(port=0, api_keys=tmp_path / "none"))


async def test_streams_of_one_key_have_a_ceiling(serve: Serve, keys: Keys) -> None:
    few, many = keys.add("few", streams=2), keys.add("many")
    engine = ScriptedEngine(ENDLESS)
    stub = InferenceServiceStub(await serve(engine, api_keys=keys.path, max_client_streams=3))
    running = [stub.StreamGenerateText(STREAM, metadata=who) for who in (few, few, many, many, many)]
    for stream in running:
        await stream.read()
    for who, name, most in ((few, "few", 2), (many, "many", 3)):
        call = stub.StreamGenerateText(STREAM, metadata=who)
        code, details = await refused(call.read())
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details.startswith(f"{most} generations of key:{name} are running, as many as it may; try again in")
        assert int(dict(await call.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
    running[0].cancel()
    async with asyncio.timeout(5):
        while engine.ended < 1:
            await asyncio.sleep(0.005)
    again = stub.StreamGenerateText(STREAM, metadata=few)
    assert (await again.read()).WhichOneof("event") == "started"
    for stream in (*running, again):
        stream.cancel()


async def test_a_key_s_own_rate_and_pages_and_priority_stand_before_the_server_s(serve: Serve, keys: Keys) -> None:
    own, plain = keys.add("own", rate=2, pages=7, priority=3), keys.add("plain")
    engine = ScriptedEngine()
    settings: dict[str, Any] = {"api_keys": keys.path, "rate_limit": 1, "max_client_pages": 50}
    stub = InferenceServiceStub(await serve(engine, **settings))
    codes = [await stub.GenerateText(UNARY, metadata=who).code() for who in (own, own, own, plain, plain)]
    full, fine = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.OK
    assert codes == [fine, fine, full, fine, full]
    asked = [(request.owner, request.max_pages, request.priority) for request in engine.requests]
    assert asked == [("key:own", 7, 3)] * 2 + [("key:plain", 50, 5)]


async def test_a_priority_above_what_a_key_allows_is_refused(serve: Serve, keys: Keys) -> None:
    mine = keys.add("low", priority=3)
    engine = ScriptedEngine()
    stub = InferenceServiceStub(await serve(engine, api_keys=keys.path))
    await stub.GenerateText(pb.GenerateTextRequest(prompt=pb.Prompt(text="x"), priority=0), metadata=mine)
    call = stub.GenerateText(pb.GenerateTextRequest(prompt=pb.Prompt(text="x"), priority=4), metadata=mine)
    code, details = await refused(call)
    assert (code, details) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "priority: got 4, allowed is [0, 3] (this caller's)",
    )
    assert [request.priority for request in engine.requests] == [0]


async def test_without_keys_an_address_has_a_rate_but_owns_nothing(serve: Serve) -> None:
    limits = CallerLimits(rate=3, streams=1, pages=5)
    context: Any = SimpleNamespace(peer=lambda: "ipv4:192.0.2.7:1")
    address = Caller(name="ipv4:192.0.2.7", named=False, rate=3)
    assert Authenticator(limits).caller(None, context) == address
    engine = ScriptedEngine()
    stub = InferenceServiceStub(await serve(engine))
    await asyncio.gather(*(stub.GenerateText(UNARY) for _ in range(4)))
    assert {(request.owner, request.max_pages) for request in engine.requests} == {(None, 0)}


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.7:1", "ipv4:192.0.2.7"),
        ("ipv4:192.0.2.7:2", "ipv4:192.0.2.7"),
        ("ipv6:%5B2001:db8::1%5D:1", "ipv6:2001:db8::/64"),
        ("ipv6:[2001:db8::ffff:1%25eth0]:1", "ipv6:2001:db8::/64"),
        ("unix:/run/socket", "unix"),
        ("unknown", "unknown"),
    ],
)
def test_ports_and_hosts_of_an_ipv6_network_are_one_caller(peer: str, address: str) -> None:
    assert address_of(peer) == address


async def test_a_certificate_names_its_caller(tmp_path: Path) -> None:
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    files = {"tls_certificate": tmp_path / "certificate", "tls_key": tmp_path / "key", "tls_client_ca": tmp_path / "ca"}
    issued = authority.issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA)
    files["tls_key"].write_bytes(issued.private_key_pem.bytes())
    files["tls_certificate"].write_bytes(issued.cert_chain_pems[0].bytes())
    authority.cert_pem.write_to_path(str(files["tls_client_ca"]))
    engine = ScriptedEngine(ENDLESS)
    server = RpcServer(engine, RpcSettings(port=0, max_client_streams=1, **files))  # type: ignore[arg-type]
    target = f"127.0.0.1:{await server.start()}"
    channels = []
    for name in ("a@example.org", "b@example.org"):
        own = authority.issue_cert(name, key_type=trustme.KeyType.ECDSA)
        credentials = grpc.ssl_channel_credentials(
            authority.cert_pem.bytes(), own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes()
        )
        channels.append(grpc.aio.secure_channel(target, credentials))
    stubs = [InferenceServiceStub(channel) for channel in channels]
    streams = [stub.StreamGenerateText(STREAM) for stub in stubs]
    for stream in streams:
        await stream.read()
    assert {request.owner for request in engine.requests} == {"certificate:a@example.org", "certificate:b@example.org"}
    code, details = await refused(stubs[0].StreamGenerateText(STREAM).read())
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details.startswith("1 generations of certificate:a@example.org are running")
    for channel in channels:
        await channel.close()
    await server.stop(0)
