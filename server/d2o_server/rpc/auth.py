"""Who calls: an API key, else a client certificate, else an address; and what such a caller may ask for."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import grpc
from grpc_health.v1 import health

from d2o_server.engine.types import MAX_PRIORITY
from d2o_server.errors import Unauthenticated
from d2o_server.rpc.api_keys import ApiKey, KeyFile
from d2o_server.rpc.errors import status_of

AUTHORIZATION = "authorization"
_SCHEME = "bearer "

Context = grpc.aio.ServicerContext[Any, Any]
Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whom a call is counted for, and up to what; 0 is any number, but for ``priority``, the highest it may ask for.

    ``named``: by a key or a certificate. Streams and pages are counted for those only: many may share an address.
    """

    name: str
    named: bool
    rate: int = 0
    streams: int = 0
    pages: int = 0
    priority: int = MAX_PRIORITY


@dataclass(frozen=True, slots=True, kw_only=True)
class CallerLimits:
    """What applies to callers whose key does not say otherwise."""

    rate: int = 0
    streams: int = 0
    pages: int = 0


class Authenticator:
    """Finds out who calls. With ``keys`` nobody is let in without one; certificates have been checked by TLS."""

    def __init__(self, limits: CallerLimits, keys: KeyFile | None = None, *, certificates: bool = False) -> None:
        self._limits, self._keys, self._certificates = limits, keys, certificates

    @property
    def wants_keys(self) -> bool:
        """Whether calls need a key."""
        return self._keys is not None

    def key(self, metadata: Metadata) -> ApiKey | None:
        """The key that came with a call; None where none is wanted.

        Raises:
            Unauthenticated: one is wanted, and there is none or a wrong one; the message does not say which.
        """
        if self._keys is None:
            return None
        given = [value for key, value in metadata if key == AUTHORIZATION]
        (token,) = given if len(given) == 1 else ("",)
        token = token if isinstance(token, str) else ""
        scheme, presented = token[: len(_SCHEME)].lower(), token[len(_SCHEME) :]
        # Looked up whatever else is wrong, so that every refusal takes as long.
        key = self._keys.find(presented)
        if key is None or scheme != _SCHEME:
            raise Unauthenticated("a valid API key is required: metadata authorization with Bearer and the key")
        return key

    def caller(self, key: ApiKey | None, context: Context) -> Caller:
        """Who calls in ``context``, with ``key``."""
        limits = self._limits
        if key is not None:
            return Caller(
                name=f"key:{key.name}",
                named=True,
                rate=limits.rate if key.rate is None else key.rate,
                streams=limits.streams if key.streams is None else key.streams,
                pages=limits.pages if key.pages is None else key.pages,
                priority=MAX_PRIORITY if key.priority is None else key.priority,
            )
        subject = _subject(context) if self._certificates else None
        if subject is not None:
            name = f"certificate:{subject}"
            return Caller(name=name, named=True, rate=limits.rate, streams=limits.streams, pages=limits.pages)
        return Caller(name=address_of(context.peer()), named=False, rate=limits.rate)


def _subject(context: Context) -> str | None:
    """Whom the caller's certificate was issued to: its first alternative name, else its common name, else all of it."""
    known = context.auth_context()
    for name in ("x509_subject_alternative_name", "x509_common_name", "x509_subject"):
        if values := known.get(name):
            return bytes(next(iter(values))).decode(errors="replace")
    return None


def address_of(peer: str) -> str:
    """The address in gRPC's name of a peer, without the port; of IPv6 the network, of which one caller has all."""
    address = peer.rpartition(":")[0] or peer
    if not address.startswith("ipv6:"):
        return address
    host = unquote(address.removeprefix("ipv6:")).strip("[]").partition("%")[0]
    try:
        return f"ipv6:{ipaddress.IPv6Network((host, 64), strict=False)}"
    except ValueError:
        return address


class OtherServicesInterceptor(grpc.aio.ServerInterceptor):
    """Asks for a key on every service but the inference service, which does so itself, and health, which is open.

    Probes of a platform cannot send keys, and what they learn is a single bit.
    """

    def __init__(self, authenticator: Authenticator, inference: str) -> None:
        self._authenticator, self._open = authenticator, frozenset({inference, health.SERVICE_NAME})

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Lets in, or refuses before anything of the call is read."""
        handler = await continuation(handler_call_details)
        service = handler_call_details.method.lstrip("/").partition("/")[0]
        if handler is None or service in self._open:
            return handler
        try:
            self._authenticator.key(handler_call_details.invocation_metadata)
        except Unauthenticated as error:
            return refusing(error)
        return handler


def refusing(error: Unauthenticated) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler that ends a call with ``error``; it takes a stream, so that no message is waited for."""
    status = status_of(error, "")

    async def refuse(_: Any, context: Context) -> None:
        await context.abort(status.code, status.details)

    handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(refuse)
    return handler
