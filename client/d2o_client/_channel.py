"""How a server is reached: its methods, and the channel's target, TLS, balancing and limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Generic, Literal, TypeVar, get_args

import grpc
from google.protobuf.message import Message

from d2o_client._errors import InvalidArgumentError, invalid
from d2o_client._health import HealthCheckRequest, HealthCheckResponse
from d2o_inference.v1 import inference_service_pb2 as pb

DEFAULT_TARGET = "127.0.0.1:50051"
LoadBalancing = Literal["pick_first", "round_robin"]
RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)


@dataclass(frozen=True, slots=True)
class Method(Generic[RequestT, ResponseT]):
    """One RPC: its path and its messages."""

    path: str
    request: type[RequestT]
    response: type[ResponseT]

    @property
    def serialize(self) -> Callable[[RequestT], bytes]:
        """Request to bytes."""
        return self.request.SerializeToString

    @property
    def parse(self) -> Callable[[bytes], ResponseT]:
        """Bytes to response."""
        return self.response.FromString


_SERVICE = "/d2o_inference.v1.InferenceService/"
GENERATE = Method(_SERVICE + "GenerateText", pb.GenerateTextRequest, pb.GenerateTextResponse)
STREAM = Method(_SERVICE + "StreamGenerateText", pb.StreamGenerateTextRequest, pb.StreamGenerateTextResponse)
TOKENIZE = Method(_SERVICE + "Tokenize", pb.TokenizeRequest, pb.TokenizeResponse)
MODEL_INFO = Method(_SERVICE + "GetModelInfo", pb.GetModelInfoRequest, pb.GetModelInfoResponse)
LOAD = Method(_SERVICE + "GetLoad", pb.GetLoadRequest, pb.GetLoadResponse)
HEALTH = Method("/grpc.health.v1.Health/Check", HealthCheckRequest, HealthCheckResponse)

File = bytes | str | PathLike[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TLS:
    """TLS, and mutual TLS where ``certificate`` and ``key`` are given. Each file is a path, or PEM as bytes.

    Attributes:
        ca: certificates that the server's must lead to; None is gRPC's own roots.
        certificate: this client's certificate chain.
        key: the private key of that certificate.
        server_name: the name to expect in the server's certificate, where it is not the target's host.
    """

    ca: File | None = None
    certificate: File | None = None
    key: File | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise InvalidArgumentError("tls: certificate and key belong together; give both or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files.

        Raises:
            InvalidArgumentError: a file cannot be read.
        """
        return grpc.ssl_channel_credentials(
            root_certificates=_read("tls.ca", self.ca),
            private_key=_read("tls.key", self.key),
            certificate_chain=_read("tls.certificate", self.certificate),
        )


def _read(field: str, given: File | None) -> bytes | None:
    if given is None or isinstance(given, bytes):
        return given
    try:
        return Path(given).read_bytes()
    except OSError as error:
        raise InvalidArgumentError(f"{field}: cannot read {str(given)!r}: {error.strerror}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelSettings:
    """A channel's target and options, checked.

    ``target`` is ``host:port`` or a gRPC name such as ``dns:///host:port`` or ``ipv4:10.0.0.1:1,10.0.0.2:1``.
    """

    target: str
    tls: TLS | None
    load_balancing: LoadBalancing
    keepalive_seconds: float | None
    max_message_bytes: int

    def __post_init__(self) -> None:
        if not self.target:
            raise invalid("target", self.target, "host:port or a gRPC name")
        if self.load_balancing not in get_args(LoadBalancing):
            raise invalid("load_balancing", self.load_balancing, "one of " + ", ".join(get_args(LoadBalancing)))
        if self.keepalive_seconds is not None and not self.keepalive_seconds > 0:
            raise invalid("keepalive_seconds", self.keepalive_seconds, "a positive number or None")
        if self.max_message_bytes <= 0:
            raise invalid("max_message_bytes", self.max_message_bytes, "a positive whole number")

    def options(self) -> list[tuple[str, str | int]]:
        """gRPC's channel arguments. gRPC's own retries are off: this package retries, and must see each failure."""
        options: list[tuple[str, str | int]] = [
            ("grpc.primary_user_agent", f"d2o-client/{version()}"),
            ("grpc.enable_retries", 0),
            ("grpc.service_config", json.dumps({"loadBalancingConfig": [{self.load_balancing: {}}]})),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 5000),
        ]
        if self.keepalive_seconds is not None:
            options.append(("grpc.keepalive_time_ms", int(self.keepalive_seconds * 1000)))
        if self.tls is not None and self.tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return options


def version() -> str:
    """This package's version, "0" where it runs from a source tree that is not installed."""
    try:
        return metadata.version("d2o-client")
    except metadata.PackageNotFoundError:
        return "0"
