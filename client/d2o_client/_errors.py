"""Everything the client raises, in one tree, and the mapping of every gRPC status onto it.

::

    D2OError
    ├── InvalidArgumentError (ValueError)   INVALID_ARGUMENT, OUT_OF_RANGE, and mistakes seen before any call
    ├── UnauthenticatedError                UNAUTHENTICATED
    ├── PermissionDeniedError               PERMISSION_DENIED
    ├── NotFoundError                       NOT_FOUND
    ├── FailedPreconditionError             FAILED_PRECONDITION, ALREADY_EXISTS, ABORTED
    ├── ResourceExhaustedError              RESOURCE_EXHAUSTED: busy, ``retry_after`` says when to come back; or a
    │                                       message that is too large
    ├── UnavailableError                    UNAVAILABLE: not reachable, draining, or its worker died
    ├── DeadlineExceededError (TimeoutError) DEADLINE_EXCEEDED
    ├── RequestCancelledError               CANCELLED; never stands in for asyncio.CancelledError
    ├── UnimplementedError                  UNIMPLEMENTED
    ├── InternalError                       INTERNAL, UNKNOWN, DATA_LOSS, and answers that break the contract
    └── ClientClosedError (RuntimeError)    the client was closed before the call
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import grpc

PUSHBACK_TRAILER = "grpc-retry-pushback-ms"
# gRPC refuses messages for their size with the status of a busy server: only its words tell the two apart.
_TOO_LARGE = re.compile(
    r"(?:(CLIENT|SERVER): )?(sent|received) message larger than max \((\d+) vs\. (\d+)\)", re.IGNORECASE
)


class D2OError(Exception):
    """Base of every error of this package.

    Attributes:
        code: the gRPC status; the class's own one for errors that were found before any call.
        details: the server's message.
        trailers: the trailing metadata; values of ``-bin`` keys are bytes.
        attempts: how many times the call was sent.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    attempts: int = 0

    def __init__(
        self,
        details: str,
        *,
        code: grpc.StatusCode | None = None,
        trailers: Mapping[str, str | bytes] | None = None,
    ) -> None:
        super().__init__(details)
        self.details = details
        self.trailers: Mapping[str, str | bytes] = dict(trailers or {})
        if code is not None:
            self.code = code

    @property
    def pushback(self) -> float | None:
        """The server's word on retrying, in seconds; None: it said nothing; negative: do not retry."""
        given = self.trailers.get(PUSHBACK_TRAILER)
        if given is None:
            return None
        try:
            return int(given) / 1000
        except ValueError:
            return -1.0

    @property
    def retry_after(self) -> float | None:
        """Seconds after which the server invites another try, or None."""
        pushback = self.pushback
        return pushback if pushback is not None and pushback >= 0 else None

    def __str__(self) -> str:
        tries = f" (after {self.attempts} attempts)" if self.attempts > 1 else ""
        return f"{self.details or self.code.name}{tries}"


class InvalidArgumentError(D2OError, ValueError):
    """An argument is out of bounds; the message names the field, what was given and what is allowed."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class UnauthenticatedError(D2OError):
    """The server wants credentials, or does not know these."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDeniedError(D2OError):
    """The credentials do not allow this call."""

    code = grpc.StatusCode.PERMISSION_DENIED


class NotFoundError(D2OError):
    """The server does not know what was named."""

    code = grpc.StatusCode.NOT_FOUND


class FailedPreconditionError(D2OError):
    """The server is not in a state that allows this call."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class ResourceExhaustedError(D2OError):
    """The server's queue, rate limit or memory is exhausted; ``retry_after`` says when to come back.

    Also a request or an answer that is larger than the server or ``max_message_bytes`` allows: it is not tried again.
    """

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(D2OError):
    """The server cannot be reached, is shutting down, or lost the worker that ran the request."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceededError(D2OError, TimeoutError):
    """The call's timeout passed, over all attempts."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class RequestCancelledError(D2OError):
    """The call was cancelled by the server, or by closing its stream or client while it was read."""

    code = grpc.StatusCode.CANCELLED


class UnimplementedError(D2OError):
    """The server does not know this call: it is older, or another service."""

    code = grpc.StatusCode.UNIMPLEMENTED


class InternalError(D2OError):
    """The server failed, or its answer breaks the contract."""

    code = grpc.StatusCode.INTERNAL


class ClientClosedError(D2OError, RuntimeError):
    """The client was closed before the call."""

    code = grpc.StatusCode.FAILED_PRECONDITION


ERROR_OF_STATUS: Mapping[grpc.StatusCode, type[D2OError]] = MappingProxyType(
    {
        grpc.StatusCode.CANCELLED: RequestCancelledError,
        grpc.StatusCode.UNKNOWN: InternalError,
        grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
        grpc.StatusCode.NOT_FOUND: NotFoundError,
        grpc.StatusCode.ALREADY_EXISTS: FailedPreconditionError,
        grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
        grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
        grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
        grpc.StatusCode.ABORTED: FailedPreconditionError,
        grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
        grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
        grpc.StatusCode.INTERNAL: InternalError,
        grpc.StatusCode.UNAVAILABLE: UnavailableError,
        grpc.StatusCode.DATA_LOSS: InternalError,
        grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    }
)


def invalid(field: str, given: object, allowed: str) -> InvalidArgumentError:
    """An argument's error, worded as the server words its own."""
    return InvalidArgumentError(f"{field}: got {reprlib.repr(given)}, allowed is {allowed}")


def is_too_large(error: D2OError) -> bool:
    """Whether gRPC itself refused a message for its size, as it would each time."""
    exhausted = error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.pushback is None
    return exhausted and _TOO_LARGE.search(error.details) is not None


def from_status(
    code: grpc.StatusCode, details: str | None, trailers: Iterable[tuple[str, str | bytes]] | None
) -> D2OError:
    """The error that stands for a finished call's status."""
    error = ERROR_OF_STATUS.get(code, InternalError)
    return error(_with_limit(details or ""), code=code, trailers=dict(trailers or ()))


def _with_limit(details: str) -> str:
    """``details``, behind whose limit a message is above where gRPC says no more than two numbers."""
    found = _TOO_LARGE.search(details)
    if found is None:
        return details
    end, way, size, most = found.groups()
    ours = (end or "").upper() == "CLIENT"
    message = "request" if ours == (way.lower() == "sent") else "answer"
    limit = "this client's max_message_bytes" if ours else "the server's limit"
    return f"{message}: got {size} bytes, allowed is at most {most}, {limit} ({details})"


def from_rpc_error(error: grpc.RpcError) -> D2OError:
    """The error that stands for what gRPC raised, from a sync or an asyncio call."""
    raised: Any = error
    return from_status(raised.code(), raised.details(), raised.trailing_metadata())
