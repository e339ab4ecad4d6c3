"""The one table from what goes wrong to the gRPC status that a caller sees."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from d2o_server import errors

STATUS_CODES: dict[type[errors.ServerError], grpc.StatusCode] = {
    errors.ServerError: grpc.StatusCode.INTERNAL,
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.OutOfDeviceMemory: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.NoWorker: grpc.StatusCode.UNAVAILABLE,
    errors.WorkerDied: grpc.StatusCode.UNAVAILABLE,
    errors.WorkersLost: grpc.StatusCode.UNAVAILABLE,
    errors.EngineFailure: grpc.StatusCode.INTERNAL,
    errors.StartupError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ModelUnsupported: grpc.StatusCode.FAILED_PRECONDITION,
    errors.SettingsError: grpc.StatusCode.FAILED_PRECONDITION,
}

RETRY_PUSHBACK = "grpc-retry-pushback-ms"

# A status travels in HTTP/2 headers, which peers bound at 8 KiB by default.
_MAX_DETAILS = 1024


@dataclass(frozen=True, slots=True)
class Status:
    """How a call ends: the code, what the caller reads and the trailers beside it."""

    code: grpc.StatusCode
    details: str
    trailers: tuple[tuple[str, str], ...] = ()

    @property
    def is_defect(self) -> bool:
        """Whether the cause is ours, so that it belongs into the log with its traceback."""
        return self.code is grpc.StatusCode.INTERNAL


def status_of(error: BaseException, reference: str) -> Status:
    """The status that ``error`` ends a call with.

    What is no ServerError, and every defect of ours, says no more than ``reference``, under which the log has it.
    """
    code = next((STATUS_CODES[kind] for kind in type(error).__mro__ if kind in STATUS_CODES), grpc.StatusCode.INTERNAL)
    if code is grpc.StatusCode.INTERNAL:
        return Status(code, f"internal error; the server's log has it under generation {reference}")
    trailers: tuple[tuple[str, str], ...] = ()
    if isinstance(error, errors.Overloaded | errors.Unavailable) and error.retry_after_ms is not None:
        trailers = ((RETRY_PUSHBACK, str(error.retry_after_ms)),)
    return Status(code, str(error)[:_MAX_DETAILS], trailers)
