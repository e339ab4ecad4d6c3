"""The health check of images and of pods with TLS, against a real server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme

from d2o_server.healthcheck import main
from d2o_server.rpc.server import RpcServer, RpcSettings
from tests.server.rpc.scripted_engine import ScriptedEngine

NAME = "d2o-serve.default.svc"


@pytest.fixture
def tls(tmp_path: Path) -> dict[str, Path]:
    """TLS files for a name that is not the loopback address."""
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    issued = authority.issue_cert(NAME, key_type=trustme.KeyType.ECDSA)
    files = {name: tmp_path / f"{name}.pem" for name in ("tls_certificate", "tls_key", "tls_client_ca")}
    files["tls_key"].write_bytes(issued.private_key_pem.bytes())
    files["tls_certificate"].write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    files["tls_client_ca"].write_bytes(authority.cert_pem.bytes())
    return files


def flags(files: dict[str, Path]) -> list[str]:
    return [f"--{name.replace('_', '-')}={path}" for name, path in files.items()]


async def checked(server: RpcServer, *arguments: str) -> int:
    port = await server.start()
    return await asyncio.to_thread(main, [f"--port={port}", *arguments])


@pytest.fixture
async def server() -> AsyncIterator[RpcServer]:
    running = RpcServer(ScriptedEngine(), RpcSettings(port=0))
    yield running
    await running.stop(0)


async def test_a_server_that_serves_is_healthy(server: RpcServer, capsys: pytest.CaptureFixture[str]) -> None:
    await server.set_serving(True)
    assert await checked(server, "--host", "0.0.0.0") == 0
    assert capsys.readouterr() == ("", "")


async def test_a_server_that_drains_is_not(server: RpcServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert await checked(server) == 1
    assert capsys.readouterr().err == "healthcheck: NOT_SERVING\n"


def test_no_server_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert main([f"--port={unused.getsockname()[1]}"]) == 1
    assert capsys.readouterr().err.startswith("healthcheck: UNAVAILABLE: ")


def test_settings_that_are_wrong_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ratio=0"]) == 1
    assert capsys.readouterr().err.startswith("healthcheck: compression.ratio: got 0.0")


@pytest.mark.parametrize("mutual", [False, True])
async def test_with_tls_the_server_s_own_files_are_used(tls: dict[str, Path], mutual: bool) -> None:
    if not mutual:
        del tls["tls_client_ca"]
    server = RpcServer(ScriptedEngine(), RpcSettings(port=0, **tls))  # type: ignore[arg-type]
    await server.set_serving(True)
    assert await checked(server, *flags(tls)) == 0
    await server.stop(0)


async def test_another_server_s_certificate_is_not_trusted(
    tls: dict[str, Path], server: RpcServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = trustme.CA(key_type=trustme.KeyType.ECDSA).issue_cert(NAME, key_type=trustme.KeyType.ECDSA)
    key, certificate = tmp_path / "other-key.pem", tmp_path / "other.pem"
    key.write_bytes(own.private_key_pem.bytes())
    certificate.write_bytes(own.cert_chain_pems[0].bytes())
    stranger = RpcServer(ScriptedEngine(), RpcSettings(port=0, tls_certificate=certificate, tls_key=key))
    await stranger.set_serving(True)
    assert await checked(stranger, *flags(tls)) == 1
    assert capsys.readouterr().err.startswith("healthcheck: ")
    await stranger.stop(0)
