"""The gRPC server: the inference service, health, reflection, limits and TLS."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from d2o_inference.v1 import inference_service_pb2_grpc as pb_grpc
from d2o_server.engine.interface import Engine
from d2o_server.errors import SettingsError, StartupError
from d2o_server.rpc.health import HealthService
from d2o_server.rpc.interceptors import SERVICE, CallInterceptor
from d2o_server.rpc.rate_limit import RateLimit
from d2o_server.rpc.service import InferenceService


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcSettings:
    """Where and how the server listens.

    Attributes:
        host: name or address to bind.
        port: 0 takes any free port.
        reflection: serve grpc.reflection.
        max_message_bytes: largest request; answers are bounded by what was asked for.
        rate_limit: generations a second that one peer may start; 0 is any number.
        max_concurrent_rpcs: inference calls at once; more are refused with RESOURCE_EXHAUSTED and a pushback.
        tls_certificate: PEM file of the certificate chain; TLS is on where it is set.
        tls_key: PEM file of its private key.
        tls_client_ca: PEM file of the authorities that callers' certificates must come from (mutual TLS).
    """

    host: str = "127.0.0.1"
    port: int = 50051
    reflection: bool = True
    max_message_bytes: int = 16 * 2**20
    max_concurrent_rpcs: int = 4096
    rate_limit: int = 0
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None

    def __post_init__(self) -> None:
        if not self.host:
            raise SettingsError("host: got an empty string, allowed is a host name or address")
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"port: got {self.port}, allowed is [0, 65535] (0 takes any free port)")
        for name, low in (("max_message_bytes", 1024), ("max_concurrent_rpcs", 1), ("rate_limit", 0)):
            if not low <= getattr(self, name) < 2**31:
                raise SettingsError(f"{name}: got {getattr(self, name)}, allowed is [{low}, {2**31 - 1}]")
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_certificate"
            raise SettingsError(
                f"{missing}: got nothing, allowed is a PEM file: tls_certificate and tls_key go together"
            )
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise SettingsError("tls_client_ca: got a file, allowed is none without tls_certificate and tls_key")


class RpcServer:
    """A grpc.aio server over an engine. Make it on the event loop that runs it.

    A shutdown that cuts nobody off: ``set_serving(False)``, a while in which calls are still taken, the engine's
    ``drain``, then ``stop``.
    """

    def __init__(self, engine: Engine, settings: RpcSettings) -> None:
        self._settings = settings
        self._health = HealthService({health.OVERALL_HEALTH, SERVICE})
        self._server = grpc.aio.server(
            interceptors=[CallInterceptor(settings.max_concurrent_rpcs)], options=_options(settings)
        )
        pb_grpc.add_InferenceServiceServicer_to_server(
            InferenceService(engine, RateLimit(settings.rate_limit)), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if settings.reflection:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)

    async def start(self) -> int:
        """Listens, NOT_SERVING until :meth:`set_serving`, and returns the port.

        Raises:
            StartupError: the address cannot be bound, or a TLS file cannot be read or used.
        """
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        address = f"{host}:{self._settings.port}"
        credentials = _credentials(self._settings)
        try:
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            allowed = "an address of this machine with a free port"
            raise StartupError(f"host, port: got {address}, allowed is {allowed}") from error
        await self._server.start()
        return port

    async def set_serving(self, serving: bool) -> None:
        """What grpc.health.v1 answers from now on."""
        await self._health.set_serving(serving)

    async def stop(self, grace: float) -> None:
        """Takes no new calls, and cancels those that still run after ``grace`` seconds."""
        await self._health.close()
        await self._server.stop(grace)

    async def wait_for_termination(self) -> None:
        """Returns once the server has stopped."""
        await self._server.wait_for_termination()


def _options(settings: RpcSettings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        # A second server on the same port is a mistake to report, not a load to share.
        ("grpc.so_reuseport", 0),
        # Finds callers that vanished without a word within 40 s, so that their pages come back.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        # Lets callers' own keepalive be as quick as once in 10 s.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def _credentials(settings: RpcSettings) -> grpc.ServerCredentials | None:
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    chain = (_read("tls_key", settings.tls_key), _read("tls_certificate", settings.tls_certificate))
    # gRPC itself says no more of unusable files than that it cannot bind.
    check = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        check.load_cert_chain(settings.tls_certificate, settings.tls_key, password=lambda: "")
    except ssl.SSLError as error:
        given = f"{settings.tls_certificate}, {settings.tls_key}"
        allowed = f"a PEM certificate and its unencrypted key ({error.reason or error})"
        raise SettingsError(f"tls_certificate, tls_key: got {given}, allowed is {allowed}") from error
    if settings.tls_client_ca is None:
        return grpc.ssl_server_credentials([chain])
    authorities = _read("tls_client_ca", settings.tls_client_ca)
    try:
        check.load_verify_locations(settings.tls_client_ca)
    except ssl.SSLError as error:
        allowed = "PEM certificates"
        raise SettingsError(f"tls_client_ca: got {settings.tls_client_ca}, allowed is {allowed}") from error
    return grpc.ssl_server_credentials([chain], root_certificates=authorities, require_client_auth=True)


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{name}: got {path}, allowed is a readable PEM file ({error.strerror})") from error
