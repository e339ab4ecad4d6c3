"""How a server is reached: TLS and mutual TLS, balancing, limits, metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from d2o_client import TLS, InvalidArgumentError, ResourceExhaustedError, UnavailableError
from d2o_client._channel import GENERATE, HEALTH, LOAD, MODEL_INFO, STREAM, TOKENIZE, ChannelSettings, Method
from d2o_inference.v1 import inference_service_pb2 as pb
from tests.client.conftest import Connect
from tests.client.scripted_service import ScriptedServer


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def pem(blobs: list[trustme.Blob]) -> bytes:
    return b"".join(blob.bytes() for blob in blobs)


def server_credentials(authority: trustme.CA, *, mutual: bool, host: str = "127.0.0.1") -> grpc.ServerCredentials:
    issued = authority.issue_cert(host)
    pair = (issued.private_key_pem.bytes(), pem(issued.cert_chain_pems))
    return grpc.ssl_server_credentials([pair], authority.cert_pem.bytes() if mutual else None, mutual)


def test_tls_trusts_the_given_authority(connect: Connect, authority: trustme.CA, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    with ScriptedServer(server_credentials(authority, mutual=False)) as server:
        for given in (ca, str(ca), ca.read_bytes()):
            assert connect(server.target, tls=TLS(ca=given)).stream("Hi").result().text == "Hello world"


def test_tls_refuses_another_authority_and_a_plain_client(connect: Connect, authority: trustme.CA) -> None:
    with ScriptedServer(server_credentials(authority, mutual=False)) as server:
        for tls in (TLS(ca=trustme.CA().cert_pem.bytes()), True, None):
            with pytest.raises(UnavailableError):
                connect(server.target, tls=tls, retry=None, timeout=10).load()


def test_a_certificate_for_another_name_needs_that_name(connect: Connect, authority: trustme.CA) -> None:
    ca = authority.cert_pem.bytes()
    with ScriptedServer(server_credentials(authority, mutual=False, host="d2o.test")) as server:
        assert connect(server.target, tls=TLS(ca=ca, server_name="d2o.test")).load().running == 3
        with pytest.raises(UnavailableError):
            connect(server.target, tls=TLS(ca=ca), retry=None).load()


def test_mutual_tls_shows_the_clients_certificate(connect: Connect, authority: trustme.CA) -> None:
    mine = authority.issue_cert("client.test")
    ca = authority.cert_pem.bytes()
    tls = TLS(ca=ca, certificate=pem(mine.cert_chain_pems), key=mine.private_key_pem.bytes())
    with ScriptedServer(server_credentials(authority, mutual=True)) as server:
        assert connect(server.target, tls=tls).load().running == 3
        with pytest.raises(UnavailableError):
            connect(server.target, tls=TLS(ca=ca), retry=None).load()


def test_a_certificate_without_its_key_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="certificate and key"):
        TLS(certificate=b"x")


def test_a_file_that_cannot_be_read_is_named(connect: Connect, tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    with pytest.raises(InvalidArgumentError, match=r"tls\.ca.*missing\.pem"):
        connect("127.0.0.1:1", tls=TLS(ca=missing)).load()


def test_round_robin_spreads_calls_and_pick_first_does_not(connect: Connect) -> None:
    with ScriptedServer() as one, ScriptedServer() as two:
        target = f"ipv4:{one.target},{two.target}"
        spread = connect(target, load_balancing="round_robin")
        while not (one.calls and two.calls):  # until both connections stand
            spread.load()
        seen = len(one.calls), len(two.calls)
        for _ in range(10):
            spread.load()
        assert (len(one.calls) - seen[0], len(two.calls) - seen[1]) == (5, 5)
        first = connect(target)
        seen = len(one.calls), len(two.calls)
        for _ in range(10):
            first.load()
        assert sorted((len(one.calls) - seen[0], len(two.calls) - seen[1])) == [0, 10]


def test_round_robin_leaves_out_a_server_that_stopped(connect: Connect) -> None:
    with ScriptedServer() as one:
        with ScriptedServer() as two:
            client = connect(f"ipv4:{one.target},{two.target}", load_balancing="round_robin")
            client.load()
        assert [client.load().running for _ in range(6)] == [3] * 6


def test_messages_may_be_larger_than_grpcs_own_default(connect: Connect, server: ScriptedServer) -> None:
    large = pb.TokenizeResponse(tokens=["x" * 5_000_000])
    server.script("Tokenize", large)
    assert len(connect(server.target).tokenize("Hi").texts[0]) == 5_000_000
    server.script("Tokenize", large)
    with pytest.raises(ResourceExhaustedError, match=r"(?i)larger than max"):
        connect(server.target, max_message_bytes=1_000_000, retry=None).tokenize("Hi")


def test_metadata_and_the_api_key_go_with_every_call(connect: Connect, server: ScriptedServer) -> None:
    client = connect(server.target, metadata={"x-team": "a"}, api_key="secret")
    client.generate("Hi", metadata=[("x-request-id", "r-1")])
    client.stream("Hi").result()
    first, second = (call.metadata for call in server.calls)
    assert (first["x-team"], first["authorization"], first["x-request-id"]) == ("a", "Bearer secret", "r-1")
    assert (second["x-team"], second["authorization"]) == ("a", "Bearer secret")
    assert "x-request-id" not in second
    assert str(first["user-agent"]).startswith("d2o-client/")


@pytest.mark.parametrize("pairs", [{"X-Team": "a"}, {"grpc-x": "a"}, {"": "a"}, {"x-team": "ä"}, {"x-team": "a\nb"}])
def test_metadata_that_http2_cannot_carry_is_refused(connect: Connect, pairs: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError, match="metadata"):
        connect("127.0.0.1:1", metadata=pairs)


def test_a_bad_api_key_is_refused_without_being_shown(connect: Connect) -> None:
    with pytest.raises(InvalidArgumentError, match="authorization") as caught:
        connect("127.0.0.1:1", api_key="sécret")
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    "given", [{"target": ""}, {"load_balancing": "random"}, {"keepalive_seconds": 0}, {"max_message_bytes": 0}]
)
def test_wrong_channel_settings_are_named(connect: Connect, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(given))):
        connect(**{"target": "127.0.0.1:1", **given})


def test_keepalive_is_sent_to_grpc_in_milliseconds() -> None:
    settings = ChannelSettings(
        target="a:1", tls=None, load_balancing="pick_first", keepalive_seconds=1.5, max_message_bytes=1
    )
    assert ("grpc.keepalive_time_ms", 1500) in settings.options()


def test_the_methods_are_those_of_the_contract() -> None:
    methods: list[Method[Any, Any]] = [GENERATE, STREAM, TOKENIZE, MODEL_INFO, LOAD]
    service = pb.DESCRIPTOR.services_by_name["InferenceService"]
    contract = {
        (f"/{service.full_name}/{method.name}", method.input_type.full_name, method.output_type.full_name)
        for method in service.methods
    }
    assert contract == {
        (method.path, method.request.DESCRIPTOR.full_name, method.response.DESCRIPTOR.full_name) for method in methods
    }
    assert HEALTH.path == "/grpc.health.v1.Health/Check"
