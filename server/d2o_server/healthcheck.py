"""``python -m d2o_server.healthcheck``: exits 0 if the server of this container is SERVING, 1 with a reason if not.

Takes the server's own flags and variables, so that it finds the port and, where TLS is on, the files. It is what an
image's health check runs, and Kubernetes' probes where TLS is on: the kubelet's own gRPC probes speak plain text only.
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from d2o_server.errors import SettingsError
from d2o_server.settings import ListenSettings, from_arguments

_SECONDS = 4.0
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - read here, not bound


def main(arguments: list[str] | None = None) -> int:
    """Asks once; returns the process's exit status."""
    try:
        listen = from_arguments(sys.argv[1:] if arguments is None else arguments, os.environ).listen
        serving = is_serving(listen, _SECONDS)
    except SettingsError as error:
        print(f"healthcheck: {error}", file=sys.stderr)
        return 1
    except grpc.RpcError as error:
        print(f"healthcheck: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"healthcheck: {error}", file=sys.stderr)
        return 1
    if not serving:
        print("healthcheck: NOT_SERVING", file=sys.stderr)
    return 0 if serving else 1


def is_serving(listen: ListenSettings, timeout: float) -> bool:
    """Whether grpc.health.v1 answers SERVING for the whole server.

    Raises:
        grpc.RpcError, OSError: it cannot be reached within ``timeout`` seconds.
    """
    host = _ANY_ADDRESS.get(listen.host, listen.host)
    target = f"[{host}]:{listen.port}" if ":" in host else f"{host}:{listen.port}"
    if listen.tls_certificate is None or listen.tls_key is None:
        channel = grpc.insecure_channel(target)
    else:
        name = _name_in_certificate(host, listen.port, listen.tls_certificate, listen.tls_key, timeout)
        # The server's own certificate is all that is trusted, and what is shown where it asks for one.
        certificate, key = listen.tls_certificate.read_bytes(), listen.tls_key.read_bytes()
        credentials = grpc.ssl_channel_credentials(certificate, key, certificate)
        channel = grpc.secure_channel(target, credentials, [("grpc.ssl_target_name_override", name)])
    with channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        reply = check(health_pb2.HealthCheckRequest(), timeout=timeout)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def _name_in_certificate(host: str, port: int, certificate: Path, key: Path, timeout: float) -> str:
    """A name that the server's certificate is valid for: it is not for the loopback address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(certificate)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, port), timeout) as plain, context.wrap_socket(plain) as secured:
        shown: dict[str, Any] = secured.getpeercert() or {}
    for kind, name in shown.get("subjectAltName", ()):
        if kind in ("DNS", "IP Address"):
            return str(name).replace("*", "healthcheck")
    allowed = "a certificate with a DNS name or an IP address"
    raise SettingsError(f"tls_certificate: got {certificate}, allowed is {allowed}")


if __name__ == "__main__":
    sys.exit(main())
