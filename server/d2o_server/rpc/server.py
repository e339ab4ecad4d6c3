"""The gRPC server: the inference service, health, reflection, limits and TLS."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from d2o_inference.v1 import inference_service_pb2_grpc as pb_grpc
from d2o_server.engine.interface import Engine
from d2o_server.errors import SettingsError, StartupError
from d2o_server.rpc import tls
from d2o_server.rpc.api_keys import KeyFile
from d2o_server.rpc.auth import Authenticator, CallerLimits, OtherServicesInterceptor
from d2o_server.rpc.health import HealthService
from d2o_server.rpc.interceptors import SERVICE, CallInterceptor
from d2o_server.rpc.service import InferenceService
from d2o_server.telemetry.calls import CallObserver

_LOWEST = {
    "max_message_bytes": 1024,
    "max_concurrent_rpcs": 1,
    "max_connections": 0,
    "rate_limit": 0,
    "max_client_streams": 0,
    "max_client_pages": 0,
}
# What callers send by mistake, such as a book, is read and refused by its field and bound, of which gRPC names neither.
# About 64 characters, as many as are tokenized, for each token of a context of 131,072.
_MESSAGE_BYTES = 8 * 2**20
# Until a connection has shaken hands, and HTTP/2 has agreed on its settings; gRPC's own is two minutes.
_HANDSHAKE_SECONDS = 10
_SECONDS_UNTIL_TAKEN = 3600
# gRPC keeps milliseconds in 32 bits.
_MOST_SECONDS = 2_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcSettings:
    """Where and how the server listens.

    Attributes:
        host: name or address to bind.
        port: 0 takes any free port.
        reflection: serve grpc.reflection.
        max_message_bytes: largest request that is read; answers are bounded by what was asked for.
        api_keys: file of the keys of which calls must carry one (:mod:`d2o_server.rpc.api_keys`); None is no keys.
        rate_limit: generations, and tokenizations, a second that one caller may start; 0 is any number.
        max_client_streams: generations that one caller with a key or certificate may run at once; 0 is any number.
        max_client_pages: cache pages that its requests may reserve at once; 0 is any number.
        max_concurrent_rpcs: inference calls at once; more are refused with RESOURCE_EXHAUSTED and a pushback.
        max_connections: connections at once; more are closed as soon as they are opened. 0 is any number.
        max_connection_age: seconds after which a connection is asked to take its next calls elsewhere, spread by a
            tenth to both sides; 0 is never.
        max_connection_age_grace: seconds that its calls then get before they are cut; None is as long as they take.
        log_prompts: write every prompt to the log.
        tls_certificate: PEM file of the certificate chain; TLS is on where it is set.
        tls_key: PEM file of its private key.
        tls_client_ca: PEM file of the authorities that callers' certificates must come from (mutual TLS).
    """

    host: str = "127.0.0.1"
    port: int = 50051
    reflection: bool = False
    max_message_bytes: int = _MESSAGE_BYTES
    max_concurrent_rpcs: int = 4096
    max_connections: int = 1000
    api_keys: Path | None = None
    rate_limit: int = 0
    max_client_streams: int = 0
    max_client_pages: int = 0
    max_connection_age: float = 0.0
    max_connection_age_grace: float | None = None
    log_prompts: bool = False
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None

    def __post_init__(self) -> None:
        if not self.host:
            raise SettingsError("host: got an empty string, allowed is a host name or address")
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"port: got {self.port}, allowed is [0, 65535] (0 takes any free port)")
        for name, low in _LOWEST.items():
            if not low <= getattr(self, name) < 2**31:
                raise SettingsError(f"{name}: got {getattr(self, name)}, allowed is [{low}, {2**31 - 1}]")
        for name in ("max_connection_age", "max_connection_age_grace"):
            given = getattr(self, name)
            if given is not None and not 0 <= given <= _MOST_SECONDS:
                raise SettingsError(f"{name}: got {given}, allowed is [0, {_MOST_SECONDS}] seconds")
        self._check_companions()

    def _check_companions(self) -> None:
        """Refuses what would do nothing without another setting."""
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_certificate"
            raise SettingsError(
                f"{missing}: got nothing, allowed is a PEM file: tls_certificate and tls_key go together"
            )
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise SettingsError("tls_client_ca: got a file, allowed is none without tls_certificate and tls_key")
        if self.api_keys is None and self.tls_client_ca is None:
            for name in ("max_client_streams", "max_client_pages"):
                if given := getattr(self, name):
                    whom = "it counts for whom a key or certificate names"
                    raise SettingsError(f"{name}: got {given}, allowed is 0 without api_keys or tls_client_ca: {whom}")
        if self.max_connection_age_grace is not None and not self.max_connection_age:
            given = self.max_connection_age_grace
            raise SettingsError(f"max_connection_age_grace: got {given}, allowed is none without max_connection_age")


class RpcServer:
    """A grpc.aio server over an engine. Make it on the event loop that runs it.

    A shutdown that cuts nobody off: ``set_serving(False)``, a while in which calls are still taken, the engine's
    ``drain``, then ``stop``. ``observer`` is told of every call; ``outer`` interceptors go around all others.

    Raises:
        SettingsError: the file of API keys cannot be used.
    """

    def __init__(
        self,
        engine: Engine,
        settings: RpcSettings,
        observer: CallObserver | None = None,
        outer: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        self._settings = settings
        self._health = HealthService({health.OVERALL_HEALTH, SERVICE})
        authenticator = _authenticator(settings)
        self._calls = CallInterceptor(settings.max_concurrent_rpcs, engine.load, observer, authenticator)
        self._server = grpc.aio.server(
            interceptors=[
                *outer,
                OtherServicesInterceptor(authenticator, SERVICE),
                self._calls,
            ],
            options=_options(settings),
        )
        pb_grpc.add_InferenceServiceServicer_to_server(
            InferenceService(engine, log_prompts=settings.log_prompts), self._server
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
        """Takes no new calls, and ends those that still run after ``grace`` seconds with UNAVAILABLE."""
        await self._health.close()
        # Its timer begins before gRPC's own, so that whoever is cut finds it set.
        cut = asyncio.get_running_loop().call_later(grace, self._calls.begin_cutting)
        await self._server.stop(grace)
        cut.cancel()

    async def wait_for_termination(self) -> None:
        """Returns once the server has stopped."""
        await self._server.wait_for_termination()


def check_files(settings: RpcSettings) -> None:
    """Reads what :class:`RpcServer` will read, so that a mistake shows before a model is loaded.

    Raises:
        SettingsError: a file cannot be read or used.
    """
    _authenticator(settings)
    _credentials(settings)


def _authenticator(settings: RpcSettings) -> Authenticator:
    limits = CallerLimits(
        rate=settings.rate_limit, streams=settings.max_client_streams, pages=settings.max_client_pages
    )
    keys = None if settings.api_keys is None else KeyFile(settings.api_keys)
    return Authenticator(limits, keys, certificates=settings.tls_client_ca is not None)


def _options(settings: RpcSettings) -> list[tuple[str, int]]:
    options = [
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
        ("grpc.server_handshake_timeout_ms", 1000 * _HANDSHAKE_SECONDS),
        # Above what is refused in words: no connection waits in silence for another's calls, and gRPC refuses none.
        ("grpc.max_concurrent_streams", 2 * settings.max_concurrent_rpcs),
        ("grpc.server.max_pending_requests", 2 * settings.max_concurrent_rpcs),
        ("grpc.server.max_pending_requests_hard_limit", 4 * settings.max_concurrent_rpcs),
        # A call that is taken late is not cancelled, as gRPC would after 30 s: its caller knows how long to wait.
        ("grpc.server_max_unrequested_time_in_server", _SECONDS_UNTIL_TAKEN),
    ]
    if settings.max_connections:
        options.append(("grpc.max_allowed_incoming_connections", settings.max_connections))
    if settings.max_connection_age > 0:
        # gRPC spreads the age by a tenth of its own accord, so that clients do not all come back at once.
        options.append(("grpc.max_connection_age_ms", max(1, round(settings.max_connection_age * 1000))))
        if settings.max_connection_age_grace is not None:
            options.append(("grpc.max_connection_age_grace_ms", round(settings.max_connection_age_grace * 1000)))
    return options


def _credentials(settings: RpcSettings) -> grpc.ServerCredentials | None:
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    return tls.credentials(
        tls.TlsFiles(certificate=settings.tls_certificate, key=settings.tls_key, client_ca=settings.tls_client_ca)
    )
