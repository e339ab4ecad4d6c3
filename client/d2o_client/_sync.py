"""The blocking client. One client serves any number of threads; one stream belongs to one of them at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self, Unpack

import grpc

from d2o_client._channel import (
    DEFAULT_TARGET,
    GENERATE,
    HEALTH,
    LOAD,
    MODEL_INFO,
    STREAM,
    TLS,
    TOKENIZE,
    ChannelSettings,
    LoadBalancing,
    Method,
    RequestT,
    ResponseT,
)
from d2o_client._core import (
    DEFAULT_KEEPALIVE,
    DEFAULT_MAX_MESSAGE_BYTES,
    DEFAULT_TIMEOUT,
    USE_DEFAULT,
    Attempts,
    Metadata,
    RetryPolicy,
    Settings,
    StreamProgress,
    Timeout,
)
from d2o_client._errors import ClientClosedError, D2OError, RequestCancelledError, from_rpc_error
from d2o_client._health import health_status
from d2o_client._options import GenerationOptions, Prompt
from d2o_client._requests import generation_fields, prompt_message
from d2o_client._responses import generation_value, load_value, model_info_value, tokens_value
from d2o_client._types import Chunk, Finished, Generation, HealthStatus, Load, ModelInfo, Started, Tokens
from d2o_inference.v1 import inference_service_pb2 as pb

_CLOSED = "the client is closed; make a new one"


class Call(Protocol):
    """What gRPC returns for a streaming call."""

    def __next__(self) -> pb.StreamGenerateTextResponse: ...

    def cancel(self) -> bool: ...


class Closing:
    """Whether something was closed, and pauses that end when it is, or when its owner is.

    Args:
        owner: what this belongs to; None for a client.
    """

    def __init__(self, owner: Closing | None = None) -> None:
        self._owner = owner
        self._changed: threading.Condition = owner._changed if owner is not None else threading.Condition()
        self.began = False

    def begin(self) -> None:
        """Ends the pauses of this and of all that belongs to it."""
        with self._changed:
            self.began = True
            self._changed.notify_all()

    def pause(self, seconds: float) -> None:
        """Sleeps, but no longer than until this or its owner is closed."""
        with self._changed:
            self._changed.wait_for(self._over, seconds)

    def _over(self) -> bool:
        return self.began or (self._owner is not None and self._owner._over())


class Stream(Iterator[Chunk]):
    """A running generation: iterate over its chunks; leaving its ``with`` block, or ``close``, cancels it.

    The call is sent with the first chunk that is asked for. Iteration raises what :meth:`Client.generate` raises.
    """

    def __init__(
        self, open_call: Callable[[float | None], Call], attempts: Callable[[], Attempts], closing: Closing
    ) -> None:
        self._open_call = open_call
        self._new_attempts = attempts
        self._attempts: Attempts | None = None
        self._call: Call | None = None
        self._progress = StreamProgress()
        self._ended = False
        self._closing = closing

    @property
    def started(self) -> Started | None:
        """Facts known at admission, once they arrived."""
        return self._progress.started

    @property
    def finished(self) -> Finished | None:
        """How generation ended, once it did."""
        return self._progress.finished

    @property
    def text(self) -> str:
        """All text so far."""
        return self._progress.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens so far."""
        return tuple(self._progress.token_ids)

    def result(self) -> Generation:
        """Reads to the end and returns the whole answer."""
        for _ in self:
            pass
        return self._progress.generation()

    def close(self) -> None:
        """Cancels the call if it still runs. Any thread may call this."""
        self._closing.begin()
        if self._call is not None:
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        """A bare loop that was left has no scope to end: the call ends with the last reference to its stream."""
        call = getattr(self, "_call", None)
        if call is not None:
            call.cancel()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        if self._ended:
            raise StopIteration
        try:
            return self._next_chunk()
        except BaseException:
            self._ended = True
            raise

    def _next_chunk(self) -> Chunk:
        if self._attempts is None:
            self._attempts = self._new_attempts()
        while True:
            try:
                chunk = self._progress.accept(next(self._running_call(self._attempts)))
            except StopIteration:
                self._progress.check_complete()
                raise
            except grpc.RpcError as error:
                self._recover(self._attempts, from_rpc_error(error))
            else:
                if chunk is not None:
                    return chunk

    def _running_call(self, attempts: Attempts) -> Call:
        if self._closing.began:
            raise RequestCancelledError("the stream was closed")
        if self._call is None:
            self._call = self._open_call(attempts.begin())
            if self._closing.began:  # by another thread, which saw no call to cancel
                self._call.cancel()
        return self._call

    def _recover(self, attempts: Attempts, failure: D2OError) -> None:
        if self._progress.has_chunks:
            raise attempts.fail(failure)
        self._closing.pause(attempts.pause_after(failure))
        self._call = None


class Client:
    """A blocking client of one d2o-serve target; close it, or use it as a context manager.

    Args:
        target: ``host:port``, or a gRPC name such as ``dns:///host:port``.
        tls: a :class:`TLS`, True for TLS with gRPC's own roots, or None for a plain connection.
        timeout: seconds that a call may take over all of its attempts; None is no limit.
        retry: when a call is sent again; None is never.
        load_balancing: ``round_robin`` spreads calls over all of the target's addresses.
        keepalive_seconds: ping a server that is silent during a call this often; it must allow it. None is never.
        max_message_bytes: largest message, sent or received.
        metadata: sent with every call.
        api_key: sent as a bearer token with every call; use it with ``tls``, or it travels in the clear.

    Raises:
        InvalidArgumentError: an argument is out of bounds.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        tls: TLS | bool | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        retry: RetryPolicy | None = RetryPolicy(),  # noqa: B008 - frozen
        load_balancing: LoadBalancing = "pick_first",
        keepalive_seconds: float | None = DEFAULT_KEEPALIVE,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        metadata: Metadata = (),
        api_key: str | None = None,
    ) -> None:
        self._settings = Settings(
            target,
            tls=tls,
            timeout=timeout,
            retry=retry,
            load_balancing=load_balancing,
            keepalive_seconds=keepalive_seconds,
            max_message_bytes=max_message_bytes,
            metadata=metadata,
            api_key=api_key,
        )
        self._channel = _open_channel(self._settings.channel)
        self._closing = Closing()

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout: Timeout = USE_DEFAULT,
        metadata: Metadata = (),
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """Generates a whole answer. ``prompt`` is text, token ids or chat messages.

        Raises:
            D2OError: see :mod:`d2o_client._errors` for the tree.
        """
        request = pb.GenerateTextRequest(**generation_fields(prompt, options))
        return generation_value(self._call(GENERATE, request, timeout, metadata))

    def stream(
        self,
        prompt: Prompt,
        *,
        timeout: Timeout = USE_DEFAULT,
        metadata: Metadata = (),
        **options: Unpack[GenerationOptions],
    ) -> Stream:
        """Generates an answer piece by piece; the timeout runs from the first chunk that is asked for.

        Raises:
            InvalidArgumentError: an argument is wrong; everything else is raised by the iteration.
        """
        request = pb.StreamGenerateTextRequest(**generation_fields(prompt, options))
        pairs = self._settings.metadata(metadata)
        self._settings.attempts(timeout)

        def open_call(seconds: float | None) -> Call:
            method = self._open_channel().unary_stream(STREAM.path, STREAM.serialize, STREAM.parse)
            with self._closed_in_between():
                return method(request, timeout=seconds, metadata=pairs)

        return Stream(open_call, lambda: self._settings.attempts(timeout), Closing(self._closing))

    def tokenize(
        self, prompt: Prompt, *, with_text: bool = False, timeout: Timeout = USE_DEFAULT, metadata: Metadata = ()
    ) -> Tokens:
        """The prompt's tokens, as generation would see them."""
        request = pb.TokenizeRequest(prompt=prompt_message(prompt), with_text=with_text)
        return tokens_value(self._call(TOKENIZE, request, timeout, metadata))

    def model_info(self, *, timeout: Timeout = USE_DEFAULT, metadata: Metadata = ()) -> ModelInfo:
        """The model, its limits and the server's defaults."""
        return model_info_value(self._call(MODEL_INFO, MODEL_INFO.request(), timeout, metadata))

    def load(
        self,
        *,
        max_streams: int = 0,
        with_layers: bool = False,
        timeout: Timeout = USE_DEFAULT,
        metadata: Metadata = (),
    ) -> Load:
        """Cache pages and requests at this moment; also the ``max_streams`` oldest requests, and each layer."""
        request = LOAD.request(max_streams=max_streams, with_layers=with_layers)
        return load_value(self._call(LOAD, request, timeout, metadata))

    def health(self, service: str = "", *, timeout: Timeout = USE_DEFAULT, metadata: Metadata = ()) -> HealthStatus:
        """The server's health, or one service's, by grpc.health.v1."""
        request = HEALTH.request(service=service)
        return health_status(self._call(HEALTH, request, timeout, metadata))

    def close(self) -> None:
        """Closes the connections and cancels what still runs. Any thread may call this."""
        self._closing.begin()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_channel(self) -> grpc.Channel:
        if self._closing.began:
            raise ClientClosedError(_CLOSED)
        return self._channel

    @contextmanager
    def _closed_in_between(self) -> Iterator[None]:
        """gRPC raises ValueError for a call on a channel that another thread has closed by then."""
        try:
            yield
        except ValueError:
            if self._closing.began:
                raise ClientClosedError(_CLOSED) from None
            raise

    def _call(
        self, method: Method[RequestT, ResponseT], request: RequestT, timeout: Timeout, metadata: Metadata
    ) -> ResponseT:
        attempts = self._settings.attempts(timeout)
        pairs = self._settings.metadata(metadata)
        while True:
            call = self._open_channel().unary_unary(method.path, method.serialize, method.parse)
            try:
                with self._closed_in_between():
                    return call(request, timeout=attempts.begin(), metadata=pairs)
            except grpc.RpcError as error:
                self._closing.pause(attempts.pause_after(from_rpc_error(error)))


def _open_channel(settings: ChannelSettings) -> grpc.Channel:
    if settings.tls is None:
        return grpc.insecure_channel(settings.target, settings.options())
    return grpc.secure_channel(settings.target, settings.tls.credentials(), settings.options())
