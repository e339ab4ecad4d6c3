"""Certificates that are wrong, out of date, missing or exchanged while the server runs; and too many connections."""

from __future__ import annotations

import asyncio
import datetime
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import trustme

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from d2o_server.rpc.server import RpcServer, RpcSettings
from tests.server.rpc.scripted_engine import FINISHED, STARTED, ScriptedEngine

YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
STREAM = pb.StreamGenerateTextRequest(prompt=pb.Prompt(text="hello"))


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


def leaf(authority: trustme.CA, name: str, until: datetime.datetime | None = None) -> trustme.LeafCert:
    return authority.issue_cert(name, key_type=trustme.KeyType.ECDSA, not_after=until)


class Files:
    """The server's PEM files."""

    def __init__(self, folder: Path) -> None:
        self.certificate, self.key, self.client_ca = (folder / name for name in ("certificate", "key", "ca"))
        self._writes = 0

    def issue(self, authority: trustme.CA, until: datetime.datetime | None = None) -> None:
        own = leaf(authority, "127.0.0.1", until)
        self._write(self.key, own.private_key_pem.bytes())
        self._write(self.certificate, b"".join(blob.bytes() for blob in own.cert_chain_pems))

    def trust(self, authority: trustme.CA) -> None:
        self._write(self.client_ca, authority.cert_pem.bytes())

    def _write(self, path: Path, content: bytes) -> None:
        new = path.with_suffix(".new")
        new.write_bytes(content)
        self._writes += 1
        os.utime(new, (time.time() + self._writes, time.time() + self._writes))
        new.replace(path)

    def settings(self, **more: object) -> RpcSettings:
        mutual = self.client_ca if self.client_ca.exists() else None
        given = {"tls_certificate": self.certificate, "tls_key": self.key, "tls_client_ca": mutual}
        return RpcSettings(port=0, **given, **more)  # type: ignore[arg-type]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@asynccontextmanager
async def listening(settings: RpcSettings, engine: ScriptedEngine | None = None) -> AsyncIterator[str]:
    server = RpcServer(engine or ScriptedEngine(), settings)
    try:
        yield f"127.0.0.1:{await server.start()}"
    finally:
        await server.stop(0)


async def code_of_a_call(target: str, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    """The status of one call over a connection of its own."""
    own = [("grpc.use_local_subchannel_pool", 1)]
    if credentials is None:
        channel = grpc.aio.insecure_channel(target, own)
    else:
        channel = grpc.aio.secure_channel(target, credentials, own)
    async with channel:
        try:
            await InferenceServiceStub(channel).GetModelInfo(pb.GetModelInfoRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


def trusting(authority: trustme.CA, own: trustme.LeafCert | None = None) -> grpc.ChannelCredentials:
    if own is None:
        return grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    chain = b"".join(blob.bytes() for blob in own.cert_chain_pems)
    return grpc.ssl_channel_credentials(authority.cert_pem.bytes(), own.private_key_pem.bytes(), chain)


async def test_a_plaintext_client_is_refused_by_a_server_with_tls(authority: trustme.CA, files: Files) -> None:
    files.issue(authority)
    async with listening(files.settings()) as target:
        assert await code_of_a_call(target, None) is grpc.StatusCode.UNAVAILABLE
        assert await code_of_a_call(target, trusting(authority)) is grpc.StatusCode.OK


async def test_a_client_with_tls_is_refused_by_a_server_without(authority: trustme.CA) -> None:
    async with listening(RpcSettings(port=0)) as target:
        assert await code_of_a_call(target, trusting(authority)) is grpc.StatusCode.UNAVAILABLE


async def test_a_server_s_expired_certificate_is_refused_by_clients(authority: trustme.CA, files: Files) -> None:
    files.issue(authority, until=YESTERDAY)
    async with listening(files.settings()) as target:
        assert await code_of_a_call(target, trusting(authority)) is grpc.StatusCode.UNAVAILABLE


async def test_clients_certificates_that_expired_or_that_others_issued_are_refused(
    authority: trustme.CA, files: Files
) -> None:
    files.issue(authority)
    files.trust(authority)
    stranger = trustme.CA(key_type=trustme.KeyType.ECDSA)
    async with listening(files.settings()) as target:
        for own, code in (
            (leaf(authority, "a@example.org"), grpc.StatusCode.OK),
            (leaf(authority, "a@example.org", until=YESTERDAY), grpc.StatusCode.UNAVAILABLE),
            (leaf(stranger, "a@example.org"), grpc.StatusCode.UNAVAILABLE),
            (None, grpc.StatusCode.UNAVAILABLE),
        ):
            assert await code_of_a_call(target, trusting(authority, own)) is code


async def test_an_exchanged_certificate_is_shown_to_the_next_connection_and_drops_no_stream(
    authority: trustme.CA, files: Files
) -> None:
    files.issue(authority)
    new = trustme.CA(key_type=trustme.KeyType.ECDSA)
    engine = ScriptedEngine((STARTED, 1.0, FINISHED))
    async with (
        listening(files.settings(), engine) as target,
        grpc.aio.secure_channel(target, trusting(authority)) as channel,
    ):
        messages = aiter(InferenceServiceStub(channel).StreamGenerateText(STREAM))
        await anext(messages)
        files.issue(new)
        assert await code_of_a_call(target, trusting(new)) is grpc.StatusCode.OK
        assert await code_of_a_call(target, trusting(authority)) is grpc.StatusCode.UNAVAILABLE
        assert [message.WhichOneof("event") async for message in messages] == ["finished"]


async def test_a_certificate_that_breaks_leaves_the_one_before(
    authority: trustme.CA, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    files.issue(authority)
    async with listening(files.settings()) as target:
        assert await code_of_a_call(target, trusting(authority)) is grpc.StatusCode.OK
        files.certificate.write_bytes(b"half a certifi")
        for _ in range(3):
            assert await code_of_a_call(target, trusting(authority)) is grpc.StatusCode.OK
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [line.partition(":")[0] for line in said] == ["the TLS certificate stays as it was"]


async def test_client_authorities_are_exchanged_too(authority: trustme.CA, files: Files) -> None:
    files.issue(authority)
    files.trust(authority)
    new = trustme.CA(key_type=trustme.KeyType.ECDSA)
    async with listening(files.settings()) as target:
        theirs = trusting(authority, leaf(new, "b@example.org"))
        assert await code_of_a_call(target, theirs) is grpc.StatusCode.UNAVAILABLE
        files.trust(new)
        assert await code_of_a_call(target, theirs) is grpc.StatusCode.OK


async def test_connections_above_the_bound_are_closed_and_those_within_go_on() -> None:
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with listening(RpcSettings(port=0, max_connections=3)) as target:
        channels = [grpc.aio.insecure_channel(target, own) for _ in range(3)]
        stubs = [InferenceServiceStub(channel) for channel in channels]
        for stub in stubs:
            await stub.GetModelInfo(pb.GetModelInfoRequest())
        assert await code_of_a_call(target, None) is grpc.StatusCode.UNAVAILABLE
        for stub in stubs:
            await stub.GetModelInfo(pb.GetModelInfoRequest())
        await channels[0].close()
        async with asyncio.timeout(5):
            while await code_of_a_call(target, None) is not grpc.StatusCode.OK:
                await asyncio.sleep(0.05)
        for channel in channels[1:]:
            await channel.close()


async def test_connections_that_never_shake_hands_are_closed(
    authority: trustme.CA, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2o_server.rpc.server._HANDSHAKE_SECONDS", 1)
    files.issue(authority)
    for settings in (files.settings(), RpcSettings(port=0)):
        async with listening(settings) as target:
            host, port = target.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            began = time.monotonic()
            async with asyncio.timeout(5):
                await reader.read()
            assert time.monotonic() - began > 0.5
            writer.close()
            await writer.wait_closed()
