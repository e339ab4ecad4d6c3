"""What surrounds every call of the inference service: a bound, the mapping of errors, and one line of log."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from d2o_server.engine.types import Load
from d2o_server.errors import InvalidRequest, Overloaded, Unauthenticated
from d2o_server.rpc.auth import Authenticator, Caller, CallerLimits
from d2o_server.rpc.errors import status_of
from d2o_server.rpc.load_trailers import load_trailers
from d2o_server.telemetry.calls import CallObserver, rejection_of
from d2o_server.telemetry.logs import FIELDS, Pairs, pairs

SERVICE = "d2o_inference.v1.InferenceService"
CLIENT_ID_KEY = "x-request-id"
MAX_CLIENT_ID_LENGTH = 128
RETRY_AFTER_MS = 250

# Cheap, and what an operator asks for when the server is full.
_UNBOUNDED_METHODS = frozenset({"GetModelInfo", "GetLoad"})

# A caller's timer runs ahead of ours by the time that its request travelled, and its reset then comes first.
_DEADLINE_SLACK = 0.05

# gRPC ends an expired call by itself, and the call's task with it, but some milliseconds after our own timer.
_EXPIRY_SECONDS = 0.25

_access = logging.getLogger("d2o_server.access")
_failures = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Behaviour = Callable[[Any, Context], Awaitable[Any]]


@dataclass(slots=True)
class CallRecord:
    """What the access log says of one call. The servicer fills in what it learns; prompts are never part of it."""

    method: str
    client_id: str | None = None
    caller: Caller | None = None
    generation_id: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    rejection: str | None = None
    trace_id: str | None = None
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    status: str = grpc.StatusCode.OK.name
    began: float = field(default_factory=time.perf_counter)

    def fields(self) -> dict[str, object]:
        """What is known of the call; durations in seconds."""
        known = {
            "method": self.method,
            "status": self.status,
            "rejection": self.rejection,
            "caller": self.caller.name if self.caller is not None and self.caller.named else None,
            **self.ids(),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "queue_seconds": _rounded(self.queue_seconds),
            "first_token_seconds": _rounded(self.first_token_seconds),
            "seconds": _rounded(time.perf_counter() - self.began),
        }
        return {key: value for key, value in known.items() if value is not None}

    def ids(self) -> dict[str, str]:
        """The ids that the call has so far."""
        known = {"generation": self.generation_id, "request": self.client_id, "trace": self.trace_id}
        return {key: value for key, value in known.items() if value is not None}

    def line(self) -> str:
        """``key=value`` pairs; a value that is no plain word is quoted as JSON, so that one call stays one line."""
        return pairs(self.fields())


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


_current: ContextVar[CallRecord] = ContextVar("d2o_server.rpc.call")


def current_call() -> CallRecord:
    """The record of the call that runs in this task."""
    return _current.get()


def caller_of(call: CallRecord) -> Caller:
    """Who made it; the interceptor found out before anything else."""
    if call.caller is None:
        raise AssertionError(f"{call.method} runs and nobody called it")
    return call.caller


def current_ids() -> dict[str, str]:
    """The ids of the call that runs in this task; none outside of calls."""
    call = _current.get(None)
    return {} if call is None else call.ids()


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Finds out who calls, bounds how many calls run at once, ends each with its error's status and the load, logs it.

    Calls of other services (health, reflection) pass untouched: a full server still answers its probes.
    """

    def __init__(
        self,
        max_concurrent_rpcs: int,
        load: Callable[[], Load],
        observer: CallObserver | None = None,
        authenticator: Authenticator | None = None,
    ) -> None:
        self._authenticator = authenticator or Authenticator(CallerLimits())
        self._limit = max_concurrent_rpcs
        self._observer = observer or CallObserver()
        self._load = load
        self._running = 0
        self._cutting = False

    def begin_cutting(self) -> None:
        """The server stops: calls that gRPC cancels from now on were ended by it, with UNAVAILABLE to their callers."""
        self._cutting = True

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the handlers of the inference service."""
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method.lstrip("/").partition("/")
        if handler is None or service != SERVICE:
            return handler
        try:
            key = self._authenticator.key(handler_call_details.invocation_metadata)
        except Unauthenticated as error:
            return self._refusing(error, CallRecord(method, client_id=_client_id(handler_call_details)))
        streams = handler.response_streaming
        behaviour = _decoding(handler.unary_stream if streams else handler.unary_unary, handler.request_deserializer)

        async def call(payload: bytes, context: Context) -> Any:
            caller = self._authenticator.caller(key, context)
            record = CallRecord(method, client_id=_client_id(handler_call_details), caller=caller)
            return await self._run(record, behaviour, payload, context)

        make: Any = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        wrapped: grpc.RpcMethodHandler[Any, Any] = make(call, response_serializer=handler.response_serializer)
        return wrapped

    def _refusing(self, error: Unauthenticated, record: CallRecord) -> grpc.RpcMethodHandler[Any, Any]:
        # It takes a stream, so that not even one message is received of a caller who is not let in.
        async def behaviour(_: Any, __: Context) -> None:
            raise error

        async def call(_: Any, context: Context) -> Any:
            return await self._run(record, behaviour, b"", context)

        handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(call)
        return handler

    async def _run(self, record: CallRecord, behaviour: Behaviour, payload: bytes, context: Context) -> Any:
        token = _current.set(record)
        record.trace_id = self._observer.trace_id()
        self._running += 1
        try:
            if self._running > self._limit and record.method not in _UNBOUNDED_METHODS:
                raise Overloaded(f"{self._limit} calls are running, the server's limit", RETRY_AFTER_MS, "call_limit")
            reply = await behaviour(payload, context)
            context.set_trailing_metadata(load_trailers(self._load()))
            return reply
        except (asyncio.CancelledError, grpc.aio.InternalError, grpc.aio.UsageError) as error:
            if isinstance(error, asyncio.CancelledError) and not _is_cancelled():
                await self._abort(error, record, context)
            # The transport fails a write before it cancels the task when a caller goes away in between.
            record.status = _gone_status(context, self._cutting).name
            raise asyncio.CancelledError from error
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets a status and the log the cause
            await self._abort(error, record, context)
        finally:
            self._running -= 1
            _current.reset(token)
            self._observer.call_ended(record.method, record.status, record.rejection)
            if _access.isEnabledFor(logging.INFO):
                fields = record.fields()
                _access.info(Pairs(fields), extra={FIELDS: fields})

    async def _abort(self, error: BaseException, record: CallRecord, context: Context) -> NoReturn:
        reference = record.generation_id or f"none-{uuid.uuid4().hex[:12]}"
        status = status_of(error, reference)
        record.status = status.code.name
        if record.generation_id is None:
            record.rejection = rejection_of(error)
        if status.is_defect:
            _failures.error("generation %s failed in %s", reference, record.method, exc_info=error)
        # Its frames hold the request, however large, while the status is on its way.
        _forget_way_of(error)
        if status.code is grpc.StatusCode.DEADLINE_EXCEEDED and time_remaining(context) == 0:
            # A status for a call that has ended fails, and gRPC loses the memory of what fails (grpc/grpc#43360).
            await asyncio.sleep(_EXPIRY_SECONDS)
        try:
            await context.abort(status.code, status.details, (*status.trailers, *load_trailers(self._load())))
        except grpc.aio.AbortError as aborted:
            # The call keeps it, and its traceback the call: all of both would lie there until a garbage collection.
            asyncio.get_running_loop().call_soon(_forget_way_of, aborted)
            raise
        except grpc.aio.InternalError as gone:
            # The caller's own deadline or cancel has ended the call already.
            raise asyncio.CancelledError from gone


def _forget_way_of(error: BaseException) -> None:
    error.__traceback__ = error.__context__ = None


def _is_cancelled() -> bool:
    # A CancelledError that nobody sent to this task leaked out of another one, and its caller still waits.
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _decoding(behaviour: Any, decode: Any) -> Behaviour:
    # Decoded inside the call, so that bytes which cannot be are the caller's error and not ours.
    async def decode_and_call(payload: bytes, context: Context) -> Any:
        try:
            message = decode(payload)
        except DecodeError:
            raise InvalidRequest("request", f"{len(payload)} bytes", "a message of the service's proto") from None
        return await behaviour(message, context)

    return decode_and_call


def time_remaining(context: Context) -> float | None:
    """Seconds until the caller's deadline, at least 0; None without one."""
    remaining: float | None = context.time_remaining()
    return remaining


def _gone_status(context: Context, cutting: bool) -> grpc.StatusCode:
    remaining = time_remaining(context)
    if remaining is not None and remaining <= _DEADLINE_SLACK:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.UNAVAILABLE if cutting else grpc.StatusCode.CANCELLED


def _client_id(details: grpc.HandlerCallDetails) -> str | None:
    for key, value in details.invocation_metadata:
        if key == CLIENT_ID_KEY and isinstance(value, str):
            return value[:MAX_CLIENT_ID_LENGTH]
    return None
