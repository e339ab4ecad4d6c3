"""The asyncio client. One client belongs to the event loop that it is first used in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

from grpc import aio

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

if TYPE_CHECKING:
    Call = aio.UnaryStreamCall[pb.StreamGenerateTextRequest, pb.StreamGenerateTextResponse]


class AsyncStream(AsyncIterator[Chunk]):
    """A running generation: iterate over its chunks; leaving its ``async with`` block, or ``aclose``, cancels it.

    The call is sent with the first chunk that is asked for. Iteration raises what :meth:`AsyncClient.generate`
    raises; cancelling the task that reads cancels the generation.
    """

    def __init__(
        self,
        open_call: Callable[[float | None], Call],
        attempts: Callable[[], Attempts],
        client_closed: asyncio.Event,
    ) -> None:
        self._open_call = open_call
        self._new_attempts = attempts
        self._attempts: Attempts | None = None
        self._call: Call | None = None
        self._progress = StreamProgress()
        self._ended = False
        self._closed = asyncio.Event()
        self._client_closed = client_closed

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

    async def result(self) -> Generation:
        """Reads to the end and returns the whole answer."""
        async for _ in self:
            pass
        return self._progress.generation()

    async def aclose(self) -> None:
        """Cancels the call if it still runs. Another task that reads it gets a RequestCancelledError."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        """A bare loop that was left has no scope to end: the call ends with the last reference to its stream."""
        call = getattr(self, "_call", None)
        if call is not None and not call.done():
            with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the call
                call.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if self._ended:
            raise StopAsyncIteration
        try:
            return await self._next_chunk()
        except BaseException:
            self._ended = True
            raise

    async def _next_chunk(self) -> Chunk:
        if self._attempts is None:
            self._attempts = self._new_attempts()
        while True:
            try:
                message = await self._read(self._attempts)
            except aio.AioRpcError as error:
                await self._recover(self._attempts, from_rpc_error(error))
                continue
            if message is None:
                self._progress.check_complete()
                raise StopAsyncIteration
            chunk = self._progress.accept(message)
            if chunk is not None:
                return chunk

    async def _read(self, attempts: Attempts) -> pb.StreamGenerateTextResponse | None:
        """The next message, None at the end."""
        if self._closed.is_set():
            raise RequestCancelledError("the stream was closed")
        if self._call is None:
            self._call = self._open_call(attempts.begin())
        try:
            message = await self._call.read()
        except asyncio.CancelledError:
            _raise_unless_task_cancelled()
            raise
        return message if isinstance(message, pb.StreamGenerateTextResponse) else None

    async def _recover(self, attempts: Attempts, failure: D2OError) -> None:
        if self._progress.has_chunks:
            raise attempts.fail(failure)
        await _pause(attempts.pause_after(failure), self._closed, self._client_closed)
        self._call = None


class AsyncClient:
    """An asyncio client of one d2o-serve target; close it, or use it as an async context manager.

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
        self._channel: aio.Channel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = asyncio.Event()

    async def generate(
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
        return generation_value(await self._call(GENERATE, request, timeout, metadata))

    def stream(
        self,
        prompt: Prompt,
        *,
        timeout: Timeout = USE_DEFAULT,
        metadata: Metadata = (),
        **options: Unpack[GenerationOptions],
    ) -> AsyncStream:
        """Generates an answer piece by piece; the timeout runs from the first chunk that is asked for.

        Raises:
            InvalidArgumentError: an argument is wrong; everything else is raised by the iteration.
        """
        request = pb.StreamGenerateTextRequest(**generation_fields(prompt, options))
        pairs = self._settings.metadata(metadata)
        self._settings.attempts(timeout)

        def open_call(seconds: float | None) -> Call:
            method = self._open_channel().unary_stream(STREAM.path, STREAM.serialize, STREAM.parse)
            return method(request, timeout=seconds, metadata=pairs)

        return AsyncStream(open_call, lambda: self._settings.attempts(timeout), self._closed)

    async def tokenize(
        self, prompt: Prompt, *, with_text: bool = False, timeout: Timeout = USE_DEFAULT, metadata: Metadata = ()
    ) -> Tokens:
        """The prompt's tokens, as generation would see them."""
        request = pb.TokenizeRequest(prompt=prompt_message(prompt), with_text=with_text)
        return tokens_value(await self._call(TOKENIZE, request, timeout, metadata))

    async def model_info(self, *, timeout: Timeout = USE_DEFAULT, metadata: Metadata = ()) -> ModelInfo:
        """The model, its limits and the server's defaults."""
        return model_info_value(await self._call(MODEL_INFO, MODEL_INFO.request(), timeout, metadata))

    async def load(
        self,
        *,
        max_streams: int = 0,
        with_layers: bool = False,
        timeout: Timeout = USE_DEFAULT,
        metadata: Metadata = (),
    ) -> Load:
        """Cache pages and requests at this moment; also the ``max_streams`` oldest requests, and each layer."""
        request = LOAD.request(max_streams=max_streams, with_layers=with_layers)
        return load_value(await self._call(LOAD, request, timeout, metadata))

    async def health(
        self, service: str = "", *, timeout: Timeout = USE_DEFAULT, metadata: Metadata = ()
    ) -> HealthStatus:
        """The server's health, or one service's, by grpc.health.v1."""
        request = HEALTH.request(service=service)
        return health_status(await self._call(HEALTH, request, timeout, metadata))

    async def close(self) -> None:
        """Closes the connections and cancels what still runs."""
        self._closed.set()
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _open_channel(self) -> aio.Channel:
        """The channel, made here and not in the constructor: it binds to the loop that runs."""
        if self._closed.is_set():
            raise ClientClosedError("the client is closed; make a new one")
        loop = asyncio.get_running_loop()
        if self._channel is None:
            self._channel, self._loop = _open_channel(self._settings.channel), loop
        if self._loop is not loop:
            raise RuntimeError("this AsyncClient belongs to another event loop; make one client a loop")
        return self._channel

    async def _call(
        self, method: Method[RequestT, ResponseT], request: RequestT, timeout: Timeout, metadata: Metadata
    ) -> ResponseT:
        attempts = self._settings.attempts(timeout)
        pairs = self._settings.metadata(metadata)
        while True:
            call = self._open_channel().unary_unary(method.path, method.serialize, method.parse)
            try:
                return await call(request, timeout=attempts.begin(), metadata=pairs)
            except aio.AioRpcError as error:
                pause = attempts.pause_after(from_rpc_error(error))
            except asyncio.CancelledError:
                _raise_unless_task_cancelled()
                raise
            await _pause(pause, self._closed)


async def _pause(seconds: float, *closed: asyncio.Event) -> None:
    """Sleeps, but no longer than until a stream or its client is closed."""
    waits = [asyncio.create_task(event.wait()) for event in closed]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _raise_unless_task_cancelled() -> None:
    """gRPC raises CancelledError for a call that was closed, too; only a cancelled task may see that."""
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        raise RequestCancelledError("the call was cancelled by closing its stream or client") from None


def _open_channel(settings: ChannelSettings) -> aio.Channel:
    if settings.tls is None:
        return aio.insecure_channel(settings.target, settings.options())
    return aio.secure_channel(settings.target, settings.tls.credentials(), settings.options())
